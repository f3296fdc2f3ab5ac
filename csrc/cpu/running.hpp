// Running sums along a block of tokens. Only row loops include this (see level.hpp).
#pragma once
#include <cstdint>

namespace tokcredit::cpu {
namespace {

typedef double Four __attribute__((vector_size(32)));

// x becomes `before` plus the sum up to and including each number, four at a time; n is a multiple of four.
// Returns the last.
template <class A> double run_forward(A *x, int64_t n, double before) {
  for (int64_t i = 0; i < n; i += 4) {
    Four y = {double(x[i]), double(x[i + 1]), double(x[i + 2]), double(x[i + 3])};
    y += Four{0, y[0], y[1], y[2]};
    y += Four{0, 0, y[0], y[1]};
    const Four sums = y + before;
    for (int64_t k = 0; k < 4; ++k)
      x[i + k] = A(sums[k]);
    before += y[3];
  }
  return before;
}

// The same from the end.
template <class A> double run_backward(A *x, int64_t n, double after) {
  for (int64_t i = n - 4; i >= 0; i -= 4) {
    Four y = {double(x[i]), double(x[i + 1]), double(x[i + 2]), double(x[i + 3])};
    y += Four{y[1], y[2], y[3], 0};
    y += Four{y[2], y[3], 0, 0};
    const Four sums = y + after;
    for (int64_t k = 0; k < 4; ++k)
      x[i + k] = A(sums[k]);
    after += y[0];
  }
  return after;
}

} // namespace
} // namespace tokcredit::cpu
