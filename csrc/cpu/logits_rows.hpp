#pragma once
#include "cpu/level.hpp"
#include "ops/logits.hpp"

namespace tokcredit::cpu {

// Token rows first to last of the logits.
TOKCREDIT_EACH_LEVEL(void logits_rows(const LogitsForward &f, int64_t first, int64_t last);
                     void logits_state_rows(const LogitsState &s, int64_t first, int64_t last);
                     void logits_gradient_rows(const LogitsBackward &b, int64_t first, int64_t last);)

} // namespace tokcredit::cpu
