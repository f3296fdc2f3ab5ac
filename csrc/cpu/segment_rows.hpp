#pragma once
#include "cpu/level.hpp"
#include "ops/array.hpp"

namespace tokcredit::cpu {

// How many of n are true, and the sum of the values where the mask (null: everywhere) is.
TOKCREDIT_EACH_LEVEL(int64_t count_true(const bool *mask, int64_t n);
                     double sum_true(Type type, const void *x, const bool *mask, int64_t n);)

} // namespace tokcredit::cpu
