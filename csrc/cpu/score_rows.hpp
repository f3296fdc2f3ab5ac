#pragma once
#include "cpu/level.hpp"
#include "math/moments.hpp"
#include "ops/score.hpp"

namespace tokcredit::cpu {

// Tokens first to last: logarithms; distances in their place, from the moments and the quantile; and so on.
TOKCREDIT_EACH_LEVEL(void log_tokens(const LogDeviation &d, int64_t first, int64_t last);
                     void distance_tokens(const LogDeviation &d, const Moments<Reduction::moments> &moments,
                                          const void *quantile, int64_t first, int64_t last);
                     void bounds_tokens(const ScoreBounds &s, int64_t first, int64_t last);
                     void factor_rows(const ScoreFactor &s, int64_t first, int64_t last);)

} // namespace tokcredit::cpu
