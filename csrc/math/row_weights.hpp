// A row's share of a count, and its weight.
#pragma once
#include "math/number.hpp"
#include "ops/row_weights.hpp"

namespace tokcredit {

TOKCREDIT_FN int64_t share_of_count(const RowWeights &w, int64_t r) {
  return w.counted == Counted::tokens ? w.lengths[r] : int64_t(w.lengths[r] > 0);
}

TOKCREDIT_FN double row_weight(const RowWeights &w, int64_t count, int64_t r) {
  const double all = double(count < 1 ? 1 : count);
  return w.factor / (all * (!w.by_length ? w.length : w.lengths[r] < 1 ? 1 : double(w.lengths[r])));
}

} // namespace tokcredit
