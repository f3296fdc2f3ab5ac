#pragma once
#include "cpu/level.hpp"
#include "ops/score.hpp"

namespace tokcredit::cpu {

// Tokens first to last.
TOKCREDIT_EACH_LEVEL(void deviation_tokens(const Deviation &d, int64_t first, int64_t last);
                     void bounds_tokens(const ScoreBounds &s, int64_t first, int64_t last);
                     void factor_tokens(const ScoreFactor &s, int64_t first, int64_t last);)

} // namespace tokcredit::cpu
