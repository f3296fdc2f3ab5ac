// Storage types and the type each is computed in: half precision in float, float and double in themselves.
// A device converts with one instruction; the host's code is what the instruction does.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TOKCREDIT_FN __host__ __device__ inline
#elif defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
// Inlined always: files for several machines would share one that stays. Sanitizers are for one machine.
#define TOKCREDIT_FN inline __attribute__((always_inline))
#else
#define TOKCREDIT_FN inline
#endif

namespace tokcredit {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T> struct accumulate {
  using type = float;
};
template <> struct accumulate<double> {
  using type = double;
};
template <class T> using accumulate_t = typename accumulate<T>::type;

// Formulas are written for a number or for a pack of them: what a comparison gives, and what stands for `?:`.
template <class A> using mask_t = decltype(A{} < A{});
template <class A> TOKCREDIT_FN A choose(bool which, A yes, A no) { return which ? yes : no; }

// x within bounds; NaN stays NaN.
template <class A> TOKCREDIT_FN A at_least(A x, A low) { return x < low ? low : x; }
template <class A> TOKCREDIT_FN A at_most(A x, A high) { return x > high ? high : x; }

TOKCREDIT_FN bool any(bool which) { return which; }

TOKCREDIT_FN uint32_t bits(float x) {
  uint32_t out;
  memcpy(&out, &x, 4);
  return out;
}
TOKCREDIT_FN float from_bits(uint32_t x) {
  float out;
  memcpy(&out, &x, 4);
  return out;
}

TOKCREDIT_FN float load(float x) { return x; }
TOKCREDIT_FN double load(double x) { return x; }
TOKCREDIT_FN float load(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &wide, 4);
  return out;
}
TOKCREDIT_FN float load(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Shift the magnitude under float's exponent and rescale by 2^112: subnormals come out right as well.
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float out;
  memcpy(&out, &magnitude, 4);
  out *= 5.192296858534828e33f;
  uint32_t wide;
  memcpy(&wide, &out, 4);
  if ((x.bits & 0x7c00) == 0x7c00)
    wide = 0x7f800000u | magnitude;
  wide |= uint32_t(x.bits & 0x8000) << 16;
  memcpy(&out, &wide, 4);
  return out;
#endif
}

TOKCREDIT_FN void store(float *p, float x) { *p = x; }
TOKCREDIT_FN void store(double *p, double x) { *p = x; }
TOKCREDIT_FN void store(bf16 *p, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#else
  uint32_t wide;
  memcpy(&wide, &x, 4);
  const bool nan = (wide & 0x7fffffffu) > 0x7f800000u;
  p->bits = nan ? 0x7fc0 : uint16_t((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
#endif
}
TOKCREDIT_FN void store(f16 *p, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#else
  uint32_t wide;
  memcpy(&wide, &x, 4);
  const uint32_t sign = (wide >> 16) & 0x8000u;
  wide &= 0x7fffffffu;
  uint32_t out;
  if (wide > 0x7f800000u) {
    out = 0x7e00;
  } else if (wide >= 0x477ff000u) { // rounds beyond the largest half
    out = 0x7c00;
  } else if (wide < 0x38800000u) { // subnormal half: let float addition do the rounding
    float shifted;
    memcpy(&shifted, &wide, 4);
    shifted += 0.5f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    out = bits - 0x3f000000u;
  } else {
    out = (wide - 0x38000000u + 0x0fffu + ((wide >> 13) & 1u)) >> 13;
  }
  p->bits = uint16_t(sign | out);
#endif
}

} // namespace tokcredit
