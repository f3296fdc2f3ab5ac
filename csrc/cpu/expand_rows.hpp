#pragma once
#include "cpu/level.hpp"
#include "ops/tree.hpp"

namespace tokcredit::cpu {

// Rows first to last, and the padding after each.
TOKCREDIT_EACH_LEVEL(void expand_rows(const Expand &e, int64_t first, int64_t last);)

} // namespace tokcredit::cpu
