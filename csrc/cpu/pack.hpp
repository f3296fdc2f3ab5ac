// Sixteen numbers side by side, in as many registers as the machine needs for them. The lanes are the same
// on every machine, so sums over them have the same bits.
// Only row loops include this: all of it is inlined or private to the file (see level.hpp).
#pragma once
#include "math/exponential.hpp"
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tokcredit::cpu {
namespace {

constexpr int64_t lanes = 16;

#if defined(__AVX512F__)
constexpr int64_t register_bytes = 64;
#elif defined(__AVX2__)
constexpr int64_t register_bytes = 32;
#else
constexpr int64_t register_bytes = 16;
#endif

template <class A> struct Register {
  typedef A type __attribute__((vector_size(register_bytes)));
};

// n registers, by halves: compilers keep the members of a structure in registers, but not the elements of an
// array.
template <class V, int64_t n> struct Registers {
  Registers<V, n / 2> low, high;
};
template <class V> struct Registers<V, 1> {
  V low;
};

// What `body` makes of each register, or of those of several packs together.
template <class Body, class V, int64_t n, class... W>
TOKCREDIT_FN auto map(Body body, const Registers<V, n> &x, const Registers<W, n> &...more) {
  if constexpr (n == 1)
    return Registers<decltype(body(x.low, more.low...)), 1>{body(x.low, more.low...)};
  else {
    const auto low = map(body, x.low, more.low...), high = map(body, x.high, more.high...);
    return Registers<decltype(body(V{}, W{}...)), n>{low, high};
  }
}

template <class V, int64_t n, class A> TOKCREDIT_FN void copy(const A *from, Registers<V, n> &to) {
  if constexpr (n == 1)
    __builtin_memcpy(&to.low, from, sizeof(V));
  else {
    copy(from, to.low);
    copy(from + sizeof to.low / sizeof(A), to.high);
  }
}

template <class V, int64_t n, class A> TOKCREDIT_FN void copy(const Registers<V, n> &from, A *to) {
  if constexpr (n == 1)
    __builtin_memcpy(to, &from.low, sizeof(V));
  else {
    copy(from.low, to);
    copy(from.high, to + sizeof from.low / sizeof(A));
  }
}

// Whether a lane of a mask is set.
template <class V> TOKCREDIT_FN bool any(const Registers<V, 1> &x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x.low, (__m512i)x.low);
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)x.low);
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)x.low);
#else
  int64_t halves[2];
  __builtin_memcpy(halves, &x.low, sizeof halves);
  return halves[0] | halves[1];
#endif
}
template <class V, int64_t n> TOKCREDIT_FN bool any(const Registers<V, n> &x) {
  return any(map([](V a, V b) { return a | b; }, x.low, x.high));
}

// The larger and the smaller of two numbers lane by lane; the second where either is NaN.
template <class V> TOKCREDIT_FN V larger_of(V a, V b) { return a > b ? a : b; }
template <class V> TOKCREDIT_FN V smaller_of(V a, V b) { return a < b ? a : b; }
#if defined(__AVX512F__) // where compilers make two instructions of it
TOKCREDIT_FN Register<float>::type larger_of(Register<float>::type a, Register<float>::type b) {
  return _mm512_maskz_max_ps(__mmask16(-1), a, b);
}
TOKCREDIT_FN Register<float>::type smaller_of(Register<float>::type a, Register<float>::type b) {
  return _mm512_maskz_min_ps(__mmask16(-1), a, b);
}
#endif

template <class A> struct Pack {
  static constexpr int64_t count = lanes * sizeof(A) / register_bytes;
  using V = typename Register<A>::type;
  using M = decltype(V{} < V{}); // lanes of -1 where something holds, else 0

  struct Mask {
    Registers<M, count> at;

    TOKCREDIT_FN friend Mask operator&(const Mask &a, const Mask &b) {
      return {map([](M x, M y) { return x & y; }, a.at, b.at)};
    }
    TOKCREDIT_FN friend Mask operator|(const Mask &a, const Mask &b) {
      return {map([](M x, M y) { return x | y; }, a.at, b.at)};
    }
    TOKCREDIT_FN friend bool any(const Mask &a) { return any(a.at); }
  };

  Registers<V, count> at;

  Pack() = default;
  TOKCREDIT_FN Pack(const Registers<V, count> &x) : at(x) {}
  TOKCREDIT_FN Pack(A x) : at(map([x](V zero) { return x - zero; }, Registers<V, count>{})) {}
  TOKCREDIT_FN explicit Pack(const A *x) { copy(x, at); }

  // The first n numbers.
  TOKCREDIT_FN void store(A *x, int64_t n) const {
    if (n >= lanes)
      return copy(at, x);
    A all[lanes];
    copy(at, all);
    __builtin_memcpy(x, all, n * sizeof(A));
  }

  // Lane by lane, in double.
  TOKCREDIT_FN void add_to(double *sums) const {
    A all[lanes];
    copy(at, all);
    for (int64_t k = 0; k < lanes; ++k)
      sums[k] += double(all[k]);
  }

#define TOKCREDIT_PACK(Result, op)                                                                           \
  TOKCREDIT_FN friend Result operator op(const Pack &a, const Pack &b) {                                     \
    return {map([](V x, V y) { return x op y; }, a.at, b.at)};                                               \
  }
  TOKCREDIT_PACK(Pack, +)
  TOKCREDIT_PACK(Pack, -)
  TOKCREDIT_PACK(Pack, *)
  TOKCREDIT_PACK(Pack, /)
  TOKCREDIT_PACK(Mask, <)
  TOKCREDIT_PACK(Mask, >)
  TOKCREDIT_PACK(Mask, ==)
  TOKCREDIT_PACK(Mask, !=)
#undef TOKCREDIT_PACK
  TOKCREDIT_FN friend Pack operator-(const Pack &a) {
    return {map([](V x) { return -x; }, a.at)};
  }
  TOKCREDIT_FN friend Pack operator<<(const Pack &a, int by) {
    return {map([by](V x) { return x << by; }, a.at)};
  }

  TOKCREDIT_FN friend Pack operator>>(const Pack &a, int by) {
    return {map([by](V x) { return x >> by; }, a.at)};
  }

  TOKCREDIT_FN friend Pack choose(const Mask &which, const Pack &yes, const Pack &no) {
    return {map([](M m, V x, V y) { return m ? x : y; }, which.at, yes.at, no.at)};
  }

  TOKCREDIT_FN friend Pack at_least(const Pack &x, const Pack &low) {
    return {map([](V a, V b) { return larger_of(a, b); }, low.at, x.at)};
  }
  TOKCREDIT_FN friend Pack at_most(const Pack &x, const Pack &high) {
    return {map([](V a, V b) { return smaller_of(a, b); }, high.at, x.at)};
  }

  TOKCREDIT_FN friend Pack<uint32_t> bits(const Pack &a) {
    return {map([](V x) { return (typename Register<uint32_t>::type)x; }, a.at)};
  }
  TOKCREDIT_FN friend Pack<float> from_bits(const Pack &a) {
    return {map([](V x) { return (typename Register<float>::type)x; }, a.at)};
  }

  // Number by number.
  template <class F> TOKCREDIT_FN Pack each(F f) const {
    A all[lanes];
    copy(at, all);
    for (A &x : all)
      x = f(x);
    return Pack(all);
  }

  TOKCREDIT_FN friend Pack exponential(const Pack &x) {
    if constexpr (std::is_same_v<A, float>)
      return exponential_from(x);
    else
      return x.each([](A v) { return tokcredit::exponential(v); });
  }
  TOKCREDIT_FN friend Pack exponential_less_one(const Pack &x) {
    if constexpr (std::is_same_v<A, float>)
      return exponentials_from(x).less_one;
    else
      return x.each([](A v) { return tokcredit::exponential_less_one(v); });
  }
  TOKCREDIT_FN friend Exponentials<Pack> exponentials(const Pack &x) {
    if constexpr (std::is_same_v<A, float>)
      return exponentials_from(x);
    else
      return {exponential(x), exponential_less_one(x)};
  }
  TOKCREDIT_FN friend Pack log_one_plus(const Pack &x) {
    if constexpr (std::is_same_v<A, float>)
      return log_one_plus_from(x);
    else
      return x.each([](A v) { return tokcredit::log_one_plus(v); });
  }
  TOKCREDIT_FN friend Pack logarithm(const Pack &x) {
    if constexpr (std::is_same_v<A, float>)
      return choose(x == x, logarithm_from(x, x - 1.0f), x);
    else
      return x.each([](A v) { return tokcredit::logarithm(v); });
  }
};

// How many lanes were set in the masks that were added.
template <class A> struct Count {
  using Mask = typename Pack<A>::Mask;
  using M = typename Pack<A>::M;
  decltype(Mask{}.at) at{};

  TOKCREDIT_FN void add(const Mask &m) {
    at = map([](M x, M y) { return x - y; }, at, m.at);
  }
  TOKCREDIT_FN void add(const Count &o) {
    at = map([](M x, M y) { return x + y; }, at, o.at);
  }
  TOKCREDIT_FN double total() const {
    std::remove_reference_t<decltype(M{}[0])> all[lanes];
    copy(at, all);
    double sum = 0;
    for (const auto each : all)
      sum += double(each);
    return sum;
  }
};

} // namespace
} // namespace tokcredit::cpu
