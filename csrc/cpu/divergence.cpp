#include "ops/divergence.hpp"
#include "cpu/divergence_rows.hpp"
#include "cpu/parallel.hpp"

namespace tokcredit::cpu {
namespace {

// Chunks of about 32k pairs of logits.
int64_t grain(const DivergenceRows &in) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(in.vocabulary, 1));
}

} // namespace

void divergence(const DivergenceForward &f, int threads) {
  const auto rows = TOKCREDIT_CHOOSE(divergence_rows);
  parallel(f.in.rows, grain(f.in), threads, [&](int64_t first, int64_t last) { rows(f, first, last); });
}

void divergence_gradient(const DivergenceBackward &b, int threads) {
  const auto rows = TOKCREDIT_CHOOSE(divergence_gradient_rows);
  parallel(b.in.rows, grain(b.in), threads, [&](int64_t first, int64_t last) { rows(b, first, last); });
}

} // namespace tokcredit::cpu
