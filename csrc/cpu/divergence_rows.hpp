#pragma once
#include "cpu/level.hpp"
#include "ops/divergence.hpp"

namespace tokcredit::cpu {

// Rows first to last; the memory is for as many floats as the last of these says.
TOKCREDIT_EACH_LEVEL(void divergence_rows(const DivergenceForward &f, int64_t first, int64_t last,
                                          float *memory);
                     void divergence_gradient_rows(const DivergenceBackward &b, int64_t first, int64_t last);
                     int64_t floats_of_divergence(const DivergenceRows &in);)

} // namespace tokcredit::cpu
