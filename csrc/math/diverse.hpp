// What a token is worth beside the tokens chosen so far, and how candidates are ordered.
#pragma once
#include "math/order.hpp"
#include "ops/diverse.hpp"
#include <math.h>

namespace tokcredit {

// Below every cosine: nothing has been compared.
constexpr float no_cosine = -2;

TOKCREDIT_FN float worth(const Diverse &d, float score, float nearest) {
  return d.product ? score * (1 - nearest) : d.weight * score - (1 - d.weight) * nearest;
}

// Larger for a larger number, then for an earlier token; never 0. NaN is the smallest number.
TOKCREDIT_FN uint64_t candidate(float number, int64_t token) {
  const uint32_t key = number != number ? order_key(-INFINITY) : order_key(number);
  return uint64_t(key) << 32 | uint32_t(~uint32_t(token));
}
TOKCREDIT_FN int64_t token_of(uint64_t candidate) { return int64_t(uint32_t(~uint32_t(candidate))); }

// NaN where the squared norm or the score is not finite.
TOKCREDIT_FN float checked_score(float score, float square) { return score + 0 * score + 0 * square; }

TOKCREDIT_FN float inverse_norm(float square) { return 1 / (sqrtf(square) + 1e-8f); }

// The body with the type of the vectors.
template <class Body> void with_vectors(Type type, Body &&body) {
  type == Type::f32 ? body(float{}) : type == Type::bf16 ? body(bf16{}) : body(f16{});
}

} // namespace tokcredit
