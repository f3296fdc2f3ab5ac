// exp without branches or tables: a loop over it becomes vector code on any compiler, and because it needs no
// fused multiply-add it gives the same bits at every vector width. A device has an instruction for 2^f.
#pragma once
#include "math/number.hpp"
#include <cmath>

namespace tokcredit {

// exp(x) = (fraction + 1) * power.
template <class A> struct Reduced {
  A fraction, power;
};

template <class A> TOKCREDIT_FN Reduced<A> reduced(A x) {
  x = at_most(at_least(x, A(-88.0f)), A(89.0f));
  // Adding 1.5 * 2^23 leaves the nearest integer n in the low bits.
  const A shifted = x * 1.44269504f + 12582912.0f;
  const A n = shifted - 12582912.0f;
  // ln 2 in two parts; n times the first, which has 9 bits, is exact.
  const A r = (x - n * 0.693359375f) - n * -2.1219444005e-4f;
  // (exp(r) - 1 - r) / r^2, minimax for |r| <= ln(2) / 2, in pairs so that fewer steps wait for each other.
  const A square = r * r;
  const A q = ((r * 1.9790223e-4f + 1.3944880e-3f) * square + (r * 8.3334983e-3f + 4.1666292e-2f)) * square +
              (r * 1.6666666e-1f + 5.0000001e-1f);
  // 2^n from its exponent; at n = -127 it is 0, at n = 128 infinity.
  return {q * square + r, from_bits((bits(shifted) << 23) + 0x3f800000u)};
}

template <class A> TOKCREDIT_FN A exponential_from(A x) {
#ifdef __CUDA_ARCH__
  x = choose(x < A(-88.0f), A(-88.0f), x);
  x = choose(x > A(89.0f), A(89.0f), x);
  const A shifted = x * 1.44269504f + 12582912.0f;
  const A n = shifted - 12582912.0f;
  // f = x / ln(2) - n, 1 / ln(2) in two parts; the instruction is within 2^-22.5 for |f| <= 1/2.
  const A f = fmaf(x, 1.92596299e-8f, fmaf(x, 1.44269504f, -n));
  A power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(f));
  return power * from_bits((bits(shifted) << 23) + 0x3f800000u);
#else
  const Reduced<A> e = reduced(x);
  return (e.fraction + 1.0f) * e.power;
#endif
}

// Within 2 ulp where the result is a normal number below 2^127.5; above infinity, below -87.7 exactly 0; NaN
// stays NaN.
TOKCREDIT_FN float exponential(float x) { return exponential_from(x); }
TOKCREDIT_FN double exponential(double x) { return std::exp(x); }

// 2^x, 0 below 2^-126. A device is within 2^-22 of it.
TOKCREDIT_FN float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
TOKCREDIT_FN double power_of_two(double x) { return std::exp2(x); }

// 2^x for x from -127, where it is 0, to 127; within a factor of 1 + 2e-7 where the result is a normal
// number. In fewer steps than exp.
template <class A> TOKCREDIT_FN A power_of_two_from(A x) {
  // Adding 1.5 * 2^23 + 127 leaves the nearest integer n and the offset of exponents in the low bits.
  const A shifted = x + 12583039.0f, r = x - (shifted - 12583039.0f);
  A y = r * 1.326472763e-3f + 9.671512646e-3f;
  y = y * r + 5.550733742e-2f;
  y = y * r + 2.402224209e-1f;
  y = y * r + 6.931469776e-1f;
  return (y * r + 1.0f) * from_bits(bits(shifted) << 23);
}

// exp(x) and exp(x) - 1 together; the second keeps its digits where x is small.
template <class A> struct Exponentials {
  A value, less_one;
};
template <class A> TOKCREDIT_FN Exponentials<A> exponentials_from(A x) {
  const Reduced<A> e = reduced(x);
  return {(e.fraction + 1.0f) * e.power, e.fraction * e.power + (e.power - 1.0f)};
}
TOKCREDIT_FN Exponentials<float> exponentials(float x) { return exponentials_from(x); }
TOKCREDIT_FN Exponentials<double> exponentials(double x) { return {std::exp(x), std::expm1(x)}; }

// log(y) for a normal number y above 0, within 2 ulp; less_one is y - 1, with digits that y may have lost.
template <class A> TOKCREDIT_FN A logarithm_from(A y, A less_one) {
  // y = 2^n * m, m from sqrt(1/2) to sqrt(2): the exponent of y * sqrt(2).
  const auto exponent = (bits(y) + (0x3f800000u - 0x3f3504f3u)) >> 23;
  const A n = from_bits(exponent + 0x4b000000u) - 8388735.0f; // 2^23 + 127
  const A m = from_bits(bits(y) - (exponent << 23) + 0x3f800000u);
  const A f = choose(n == A{}, less_one, m - 1.0f); // where y is not scaled
  // (log(1 + f) - f + f^2 / 2) / f^3
  A q = f * 7.0376836292e-2f - 1.1514610310e-1f;
  q = q * f + 1.1676998740e-1f;
  q = q * f - 1.2420140846e-1f;
  q = q * f + 1.4249322787e-1f;
  q = q * f - 1.6668057665e-1f;
  q = q * f + 2.0000714765e-1f;
  q = q * f - 2.4999993993e-1f;
  q = q * f + 3.3333331174e-1f;
  const A square = f * f;
  return (f + (f * square * q + n * -2.1219444005e-4f - square * 0.5f)) + n * 0.693359375f;
}

// log(1 + x) for -1 < x <= 0.
template <class A> TOKCREDIT_FN A log_one_plus_from(A x) { return logarithm_from(x + 1.0f, x); }
TOKCREDIT_FN float log_one_plus(float x) { return log_one_plus_from(x); }
TOKCREDIT_FN double log_one_plus(double x) { return std::log1p(x); }

// exp(x) - 1, and log(x) for a normal number x above 0; NaN stays NaN.
TOKCREDIT_FN float exponential_less_one(float x) { return std::expm1(x); }
TOKCREDIT_FN double exponential_less_one(double x) { return std::expm1(x); }
TOKCREDIT_FN float logarithm(float x) { return std::log(x); }
TOKCREDIT_FN double logarithm(double x) { return std::log(x); }

// log(y + lost) for y > 0, where lost is below a unit of the last place of y; within 2 ulp. -inf at 0, NaN
// below. On the host without branches, like exp.
TOKCREDIT_FN float log_from(float y, float lost) {
  // y = 2^power * m with m in [sqrt(1/2), sqrt(2)), and f = m - 1.
  const uint32_t shifted = bits(y) - 0x3f3504f3u;
  const int32_t power = int32_t(shifted) >> 23;
  const float n = float(power), rest = lost * from_bits(uint32_t(127 - power) << 23);
  const float f = (from_bits((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f) + rest;
  // (log(1 + f) - f + f^2 / 2) / f^3, minimax there, in pairs so that fewer steps wait for each other.
  const float square = f * f;
  const float p = ((f * -7.63410951e-2f + 1.27613972e-1f) * square + (f * -1.31602400e-1f + 1.42017858e-1f)) *
                      (square * square) +
                  ((f * -1.66233544e-1f + 2.00012256e-1f) * square + (f * -2.50008211e-1f + 3.33333317e-1f));
  // ln 2 in two parts, as in exp.
  const float log = n * 0.693359375f + (f + (n * -2.1219444005e-4f + square * (f * p - 0.5f)));
  return y == float(INFINITY) ? y : y > 0.0f ? log : y == 0.0f ? -float(INFINITY) : float(NAN);
}

// log(x) for x that are no subnormal numbers, and log(1 + x).
TOKCREDIT_FN float log_of(float x) {
#ifdef __CUDA_ARCH__
  return logf(x);
#else
  return log_from(x, 0.0f);
#endif
}
TOKCREDIT_FN double log_of(double x) { return std::log(x); }
TOKCREDIT_FN float log_of_one_plus(float x) {
#ifdef __CUDA_ARCH__
  return log1pf(x);
#else
  const float y = 1.0f + x;
  return log_from(y, x - (y - 1.0f));
#endif
}
TOKCREDIT_FN double log_of_one_plus(double x) { return std::log1p(x); }

} // namespace tokcredit
