#pragma once
#include "cpu/level.hpp"
#include "ops/policy_loss.hpp"

namespace tokcredit::cpu {

// Rows first to last, and the padding after each.
TOKCREDIT_EACH_LEVEL(void policy_loss_rows(const PolicyLoss &p, int64_t first, int64_t last);)

// Rows first to last.
TOKCREDIT_EACH_LEVEL(void scale_rows(const ScaleRows &s, int64_t first, int64_t last);)

} // namespace tokcredit::cpu
