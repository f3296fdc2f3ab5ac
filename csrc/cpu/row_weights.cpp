#include "ops/row_weights.hpp"
#include "math/row_weights.hpp"

namespace tokcredit::cpu {

void row_weights(const RowWeights &w) {
  int64_t count = w.given < 0 ? 0 : w.given;
  for (int64_t r = 0; w.given < 0 && r < w.rows; ++r)
    count += share_of_count(w, r);
  for (int64_t r = 0; r < (w.by_length ? w.rows : 1); ++r)
    w.y[r] = row_weight(w, count, r);
}

} // namespace tokcredit::cpu
