// The squared length of a token's score in the logits: |onehot(token) - p|^2 = 1 - 2 p(token) + sum of p^2.
#pragma once
#include "math/exponential.hpp"

namespace tokcredit {

// At least 0, as it is before rounding; otherwise sums over several rows could cancel. NaN stays NaN.
template <class A> TOKCREDIT_FN A energy(A log_prob, A squares) {
  const A x = A(1) - A(2) * exponential(log_prob) + squares;
  return choose(x < A(0), A(0), x);
}

} // namespace tokcredit
