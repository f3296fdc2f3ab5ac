// A row of the vocabulary in blocks of numbers of the accumulation type, for row loops (see level.hpp).
#pragma once
#include "cpu/pack.hpp"
#include "math/dispatch.hpp"

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

// The body with the type, one that is summed in A, as a template argument.
template <class A, class Body> void with_summed_in(Type type, Body &&body) {
  if constexpr (std::is_same_v<A, double>)
    body(tag<double>{});
  else if (type == Type::f32)
    body(tag<float>{});
  else if (type == Type::bf16)
    body(tag<bf16>{});
  else
    body(tag<f16>{});
}

// The largest of n numbers, NaN left out.
template <class A> A largest_of(const A *values, int64_t n) {
  Pack<A> packs = A(-INFINITY);
  for (int64_t k = 0; k < n; k += lanes) {
    const Pack<A> v(values + k);
    packs = at_least(packs, v);
  }
  return largest_lane(packs);
}

// Where a number is among others.
template <class A> int64_t place_of(A number, const A *values) {
  int64_t k = 0;
  while (values[k] != number)
    ++k;
  return k;
}

} // namespace
} // namespace tokcredit::cpu
