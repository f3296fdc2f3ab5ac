#pragma once
#include "cpu/level.hpp"
#include "ops/divergence.hpp"

namespace tokcredit::cpu {

// Rows first to last.
TOKCREDIT_EACH_LEVEL(void divergence_rows(const DivergenceForward &f, int64_t first, int64_t last);
                     void divergence_gradient_rows(const DivergenceBackward &b, int64_t first, int64_t last);)

} // namespace tokcredit::cpu
