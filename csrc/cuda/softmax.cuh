// Sums of exponentials that keep their digits where one probability is close to 1.
#pragma once
#include "cuda/powers.cuh"

namespace tokcredit::cuda {

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
