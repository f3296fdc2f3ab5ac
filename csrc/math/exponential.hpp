// exp without branches or tables: a loop over it becomes vector code on any compiler, and because it needs no
// fused multiply-add it gives the same bits at every vector width.
#pragma once
#include "math/number.hpp"
#include <cmath>

namespace tokcredit {

template <class A> TOKCREDIT_FN A exponential_from(A x) {
  x = choose(x < A(-104.0f), A(-104.0f), x); // exp(-104) is less than half the smallest subnormal
  x = choose(x > A(89.0f), A(89.0f), x);
  // Adding 1.5 * 2^23 leaves the nearest integer n in the low bits.
  const A shifted = x * 1.44269504f + 12582912.0f;
  const A n = shifted - 12582912.0f;
  const auto power = bits(shifted) - 0x4b400000;
  // ln 2 in two parts; n times the first, which has 9 bits, is exact.
  const A r = (x - n * 0.693359375f) - n * -2.1219444005e-4f;
  // (exp(r) - 1 - r) / r^2, minimax for |r| <= ln(2) / 2.
  A q = r * 1.9790223e-4f + 1.3944880e-3f;
  q = q * r + 8.3334983e-3f;
  q = q * r + 4.1666292e-2f;
  q = q * r + 1.6666666e-1f;
  q = q * r + 5.0000001e-1f;
  const A y = (q * (r * r) + r) + 1.0f;
  // 2^n in two factors, both normal, so that subnormal results are rounded once.
  const auto half = power >> 1;
  return y * from_bits((half + 127) << 23) * from_bits((power - half + 127) << 23);
}

// Within 2 ulp on [-104, 88]; from 89 on infinity; below -104, -inf included, exactly 0; NaN stays NaN.
TOKCREDIT_FN float exponential(float x) { return exponential_from(x); }
TOKCREDIT_FN double exponential(double x) { return std::exp(x); }

} // namespace tokcredit
