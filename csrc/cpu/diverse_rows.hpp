#pragma once
#include "cpu/level.hpp"
#include "ops/array.hpp"

namespace tokcredit::cpu {

// The inner product of the vectors of two tokens.
TOKCREDIT_EACH_LEVEL(float inner_product(Type type, const void *x, int64_t width, int64_t a, int64_t b);)

} // namespace tokcredit::cpu
