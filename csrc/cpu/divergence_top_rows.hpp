#pragma once
#include "cpu/level.hpp"
#include "ops/divergence_top.hpp"

namespace tokcredit::cpu {

// Rows first to last.
TOKCREDIT_EACH_LEVEL(void divergence_top_rows(const DivergenceTopForward &f, int64_t first, int64_t last);
                     void divergence_top_gradient_rows(const DivergenceTopBackward &b, int64_t first,
                                                       int64_t last);)

} // namespace tokcredit::cpu
