// A row of the vocabulary in blocks of numbers of the accumulation type, for row loops (see level.hpp).
#pragma once
#include "cpu/pack.hpp"

namespace tokcredit::cpu {
namespace {

// Logits per block: what is summed in float before it joins a sum in double.
constexpr int64_t block = 1024;

// exp of less is 0 in float; a finite floor keeps 0 * d at 0 where a logit is -inf. Double reaches further.
template <class A> constexpr A lowest = std::is_same_v<A, float> ? A(-104) : A(-746);

// Up to `block` logits as numbers of the accumulation type, and `absent` after them to the end of a pack.
template <class T, class A> void read(const T *x, int64_t n, A absent, A *out) {
  for (int64_t k = 0; k < n; ++k)
    out[k] = load(x[k]);
  for (int64_t k = n; k % lanes; ++k)
    out[k] = absent;
}

template <class A> A largest_lane(const Pack<A> &x) {
  A all[lanes], out = A(-INFINITY);
  x.store(all, lanes);
  for (const A each : all)
    out = out < each ? each : out;
  return out;
}

} // namespace
} // namespace tokcredit::cpu
