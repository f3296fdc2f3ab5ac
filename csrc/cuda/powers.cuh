// Powers of 2 for sums of exponentials: a logit is scaled by log2(e) once, and the hardware's instruction
// does the rest.
#pragma once
#include "cuda/launch.cuh"
#include "math/exponential.hpp"

namespace tokcredit::cuda {

// The larger number; of a number and NaN the number.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// 2 to less is 0. A finite floor keeps 2^d * d at 0 where a logit is -inf.
__device__ inline float floored(float x) { return larger(x, -150.0f); }
__device__ inline double floored(double x) { return larger(x, -1080.0); }

__device__ inline float lowest(float) { return -3.402823466e38f; }
__device__ inline double lowest(double) { return -1.7976931348623157e308; }

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

} // namespace tokcredit::cuda
