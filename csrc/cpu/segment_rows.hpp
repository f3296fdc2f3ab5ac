#pragma once
#include "cpu/level.hpp"
#include "ops/segment.hpp"

namespace tokcredit::cpu {

// Of n values those where the mask (null: everywhere) is true: how many, their sum, their mean and the sum of
// squares about it, the least or greatest.
TOKCREDIT_EACH_LEVEL(int64_t count_true(const bool *mask, int64_t n);
                     double sum_true(Type type, const void *x, const bool *mask, int64_t n);
                     void squares_true(Type type, const void *x, const bool *mask, int64_t n, double &mean,
                                       double &square);
                     double extreme_true(Type type, const void *x, const bool *mask, int64_t n, bool least);)

TOKCREDIT_EACH_LEVEL(void affine_rows(const RowAffine &a, int64_t first, int64_t last);)

} // namespace tokcredit::cpu
