// Powers of 2 for sums of exponentials: a logit is scaled by log2(e) once, and the hardware's instruction
// does the rest.
#pragma once
#include "cuda/launch.cuh"

namespace tokcredit::cuda {

// 2^x by the hardware, within 2 ulp, and 0 below 2^-126; double by the library.
__device__ inline float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ inline double power_of_two(double x) { return exp2(x); }

// The larger number; of a number and NaN the number.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// 2 to less is 0. A finite floor keeps 2^d * d at 0 where a logit is -inf.
__device__ inline float floored(float x) { return larger(x, -150.0f); }
__device__ inline double floored(double x) { return larger(x, -1080.0); }

__device__ inline float lowest(float) { return -3.402823466e38f; }
__device__ inline double lowest(double) { return -1.7976931348623157e308; }

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

// Sums of 2^d, of d * 2^d and of between * 2^d, d = (x - most) * scale being at most 0. The first leaves out
// one logit that is the largest: where p is close to 1, the sum of the others keeps digits that 1 + others
// would lose. `between` of that logit is added in double.
template <class A> struct Sums {
  A most;
  double others = -1, weighted = 0, difference = 0; // -1: no logit yet

  __device__ void raise(A to, A scale) {
    const double d = double(floored((most - to) * scale)), factor = double(power_of_two(A(d)));
    weighted = factor * (weighted + d * (1 + others));
    difference *= factor;
    others = factor * (1 + others);
    most = to;
  }

  // between(k) is a number of A, exactly(k) the same in double.
  template <bool differs, int width, class Between, class Exactly>
  __device__ void add(const A (&x)[width], A scale, Between &&between, Exactly &&exactly) {
    A top = x[0];
#pragma unroll
    for (int k = 1; k < width; ++k)
      top = larger(top, x[k]);
    const bool raised = top > most;
    if (raised)
      raise(top, scale);
    A p = 0, w = 0, b = 0;
    int left_out = raised ? -1 : width;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const A d = (x[k] - most) * scale, e = power_of_two(d);
      w += e * floored(d);
      const bool leave = left_out < 0 && d == 0; // never for inf - inf
      left_out = leave ? k : left_out;
      p += leave ? A(0) : e;
      if (differs)
        b += leave || !(e > 0) ? A(0) : e * between(k);
    }
    others += double(p);
    weighted += double(w);
    if (differs) {
      difference += double(b);
      if (raised) {
#pragma unroll
        for (int k = 0; k < width; ++k)
          if (k == left_out)
            difference += exactly(k);
      }
    }
  }

  __device__ void merge(Sums o, A scale) {
    if (most < o.most)
      raise(o.most, scale);
    else
      o.raise(most, scale);
    others += o.others;
    weighted += o.weighted;
    difference += o.difference;
  }
};

} // namespace tokcredit::cuda
