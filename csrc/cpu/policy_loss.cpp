#include "ops/policy_loss.hpp"
#include "cpu/parallel.hpp"
#include "cpu/policy_loss_rows.hpp"

namespace tokcredit::cpu {

void policy_loss(const PolicyLoss &p, int threads) {
  const auto rows = TOKCREDIT_CHOOSE(policy_loss_rows);
  parallel(p.rows.count, row_grain(p.rows.count, p.rows.size), threads,
           [&](int64_t first, int64_t last) { rows(p, first, last); });
}

void scale_rows(const ScaleRows &s, int threads) {
  const auto rows = TOKCREDIT_CHOOSE(scale_rows);
  parallel(s.rows.count, row_grain(s.rows.count, s.rows.size, light), threads,
           [&](int64_t first, int64_t last) { rows(s, first, last); });
}

} // namespace tokcredit::cpu
