// Four tokens at a time, a few times per thread, so that what all tokens share is worked out seldom.
#include "cuda/tile.cuh"
#include "math/score.hpp"

namespace tokcredit::cuda {
namespace {

constexpr int rounds = 4;
constexpr int64_t block_tokens = int64_t(block_threads) * quad * rounds;

template <class A> struct Buffer {
  A *p;
  int64_t size;
  bool aligned;

  __device__ Buffer(const void *data, int64_t n)
      : p(static_cast<A *>(const_cast<void *>(data))), size(n), aligned(quads_aligned(p)) {}
  __device__ Quad<A> load(int64_t t) const { return load_quad(p, t, size, aligned); }
  __device__ void store(int64_t t, const Quad<A> &x) const { store_quad(p, t, 0, size, aligned, x); }
};

// Calls body(t) for the first token of each four of this thread.
template <class Body> __device__ void each_four(int64_t size, Body &&body) {
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int64_t t = blockIdx.x * block_tokens + (int64_t(round) * block_threads + threadIdx.x) * quad;
    if (t < size)
      body(t);
  }
}

template <class A, class F> __device__ Quad<A> map(const Quad<A> &x, F &&f) {
  Quad<A> y;
#pragma unroll
  for (int k = 0; k < quad; ++k)
    y.item[k] = f(x.item[k], k);
  return y;
}

template <class A> __global__ void __launch_bounds__(block_threads) deviations(Deviation d) {
  const DeviationOf<A> of(d);
  const Buffer<A> x(d.x, d.size), y(d.y, d.size);
  each_four(d.size, [&](int64_t t) { y.store(t, map(x.load(t), [&](A v, int) { return of(v); })); });
}

template <class A> __global__ void __launch_bounds__(block_threads) bounds(ScoreBounds s) {
  const BoundsOf<A> of(s);
  const Buffer<A> score(s.score, s.size), below(s.below, s.size), above(s.above, s.size);
  each_four(s.size, [&](int64_t t) {
    const Quad<A> h = score.load(t);
    Quad<A> high;
    below.store(t, map(h, [&](A v, int k) {
                  const Bounds<A> b = of(v);
                  high.item[k] = b.above;
                  return b.below;
                }));
    above.store(t, high);
  });
}

template <class A> __global__ void __launch_bounds__(block_threads) factors(ScoreFactor s) {
  const Buffer<A> score(s.score, s.size), ratio(s.log_ratio, s.size), low(s.low, s.size), high(s.high, s.size),
      y(s.y, s.size);
  const auto bound = [](const Buffer<A> &given, double number, int64_t t) {
    Quad<A> x;
#pragma unroll
    for (int k = 0; k < quad; ++k)
      x.item[k] = A(number);
    return map(given.p ? given.load(t) : x, [](A v, int) { return exponential(v); });
  };
  each_four(s.size, [&](int64_t t) {
    const Quad<A> x = ratio.load(t), l = bound(low, s.low_number, t), h = bound(high, s.high_number, t);
    y.store(t, map(score.load(t), [&](A v, int k) {
              return factor_of(v, x.item[k], l.item[k], h.item[k], A(s.strength));
            }));
  });
}

template <class S> void launch_tokens(const S &s, void (*wide)(S), void (*narrow)(S), Queue &queue) {
  launch("score", queue, s.type == Type::f64 ? wide : narrow, ceil_div(s.size, block_tokens), block_threads,
         s);
}

} // namespace

void deviation(const Deviation &d, Queue &queue) {
  launch_tokens(d, deviations<double>, deviations<float>, queue);
}

void score_bounds(const ScoreBounds &s, Queue &queue) {
  launch_tokens(s, bounds<double>, bounds<float>, queue);
}

void score_factor(const ScoreFactor &s, Queue &queue) {
  launch_tokens(s, factors<double>, factors<float>, queue);
}

} // namespace tokcredit::cuda
