// Running sums along a block of tokens. Only row loops include this (see level.hpp).
#pragma once
#include <cstdint>

namespace tokcredit::cpu {
namespace {

typedef double Four __attribute__((vector_size(32)));

template <class A> struct Stored {
  typedef A type __attribute__((vector_size(4 * sizeof(A))));
};
template <class A> Four read_four(const A *x) {
  typename Stored<A>::type stored;
  __builtin_memcpy(&stored, x, sizeof stored);
  return __builtin_convertvector(stored, Four);
}
template <class A> void write_four(Four y, A *x) {
  const auto stored = __builtin_convertvector(y, typename Stored<A>::type);
  __builtin_memcpy(x, &stored, sizeof stored);
}

// The sums within four numbers, from the first or from the last on.
inline Four within_forward(Four y) {
  y += Four{0, y[0], y[1], y[2]};
  return y + Four{0, 0, y[0], y[1]};
}
inline Four within_backward(Four y) {
  y += Four{y[1], y[2], y[3], 0};
  return y + Four{y[2], y[3], 0, 0};
}
// x becomes `before` plus the sum up to and including each number; n is a multiple of `at_once`. Returns the
// last. So many at a time, because each step waits for the sum of the one before.
constexpr int64_t at_once = 16;
template <class A> double run_forward(A *x, int64_t n, double before) {
  for (int64_t i = 0; i < n; i += at_once) {
    double sum = 0;
    for (int64_t k = i; k < i + at_once; k += 4) {
      const Four y = within_forward(read_four(x + k));
      write_four(y + (before + sum), x + k);
      sum += y[3];
    }
    before += sum;
  }
  return before;
}

// The same from the end.
template <class A> double run_backward(A *x, int64_t n, double after) {
  for (int64_t i = n - at_once; i >= 0; i -= at_once) {
    double sum = 0;
    for (int64_t k = i + at_once - 4; k >= i; k -= 4) {
      const Four y = within_backward(read_four(x + k));
      write_four(y + (after + sum), x + k);
      sum += y[0];
    }
    after += sum;
  }
  return after;
}

} // namespace
} // namespace tokcredit::cpu
