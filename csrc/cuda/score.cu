// Four tokens at a time, a few times per thread, so that what all tokens share is worked out seldom.
#include "cuda/tile.cuh"
#include "math/dispatch.hpp"
#include "math/score.hpp"
#include "ops/segment.hpp"
#include "ops/select.hpp"

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

template <class T> __global__ void __launch_bounds__(block_threads) logs(LogDeviation d) {
  using A = accumulate_t<T>;
  const Buffer<T> x(d.x, d.rows.size);
  const Buffer<A> y(d.y, d.rows.size);
  each_four(d.rows.size, [&](int64_t t) {
    const Quad<T> four = x.load(t);
    Quad<A> out;
#pragma unroll
    for (int k = 0; k < quad; ++k)
      out.item[k] = floored_log(A(load(four.item[k])), d.floor);
    y.store(t, out);
  });
}

using AllMoments = Moments<Reduction::moments>;

// Moments of all rows from those of each, and the rank of the quantile. By one warp: there are only as many
// as rows.
__global__ void merge_rows(LogDeviation d, const double *table, AllMoments *all, int64_t *rank) {
  const int64_t share = ceil_div(d.rows.count, 32), first = min(lane_id() * share, d.rows.count);
  __shared__ AllMoments part[32];
  part[lane_id()] = merged(table, first, min(first + share, d.rows.count));
  __syncwarp();
  if (lane_id() != 0)
    return;
  AllMoments m = part[0];
  for (int lane = 1; lane < 32; ++lane)
    m.merge(part[lane]);
  *all = m;
  *rank = nearest_rank(d.quantile, m.count);
}

template <class A>
__global__ void __launch_bounds__(block_threads)
    distances(LogDeviation d, const AllMoments *all, const A *quantile) {
  const Distance<A> distance(d, *all, *quantile);
  if (blockIdx.x == 0 && threadIdx.x == 0)
    distance.write(d.statistics);
  const Buffer<A> y(d.y, d.rows.size);
  each_four(d.rows.size,
            [&](int64_t t) { y.store(t, map(y.load(t), [&](A v, int) { return distance(v); })); });
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

template <class A> __global__ void __launch_bounds__(block_threads) factors(ScoreFactor s, int64_t tiles) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const FactorOf<A> of(s);
  const int64_t size = s.rows.size, from = place * tile_size;
  const Buffer<A> score(s.score, size), log_probs(s.log_probs, size), reference(s.reference, size),
      low(s.low_bound, size), high(s.high_bound, size), y(s.y, size);
  each_piece<false>(
      s.rows, from, min(from + tile_size, size),
      [&](int64_t r, int64_t first, int64_t last, bool, bool) {
        const A advantage = static_cast<const A *>(s.advantages)[r];
        each_step<false>(first, last, [&](int64_t t) {
          if (t + quad <= first || t >= last)
            return;
          const Quad<A> h = score.load(t), o = s.reference ? reference.load(t) : Quad<A>{};
          const Quad<A> x = map(log_probs.load(t), [&](A v, int k) { return of.log_ratio(v, o.item[k]); });
          const Quad<A> below = s.low_bound ? low.load(t) : Quad<A>{},
                        above = s.low_bound ? high.load(t) : Quad<A>{};
          store_quad(y.p, t, first, last, y.aligned, map(h, [&](A v, int k) {
                       return advantage * (s.low_bound ? of(v, x.item[k], below.item[k], above.item[k])
                                                       : of(v, x.item[k]));
                     }));
        });
      },
      [&](int64_t first, int64_t last) { fill_zero(y.p, first, last); });
}

} // namespace

void log_deviation(const LogDeviation &d, Queue &queue) {
  const int64_t rows = d.rows.count, blocks = ceil_div(d.rows.size, block_tokens);
  AllMoments *all;
  double *table;
  int64_t *rank;
  allocate_together(queue, Wanted{all, 1}, Wanted{table, rows * width_of(Reduction::moments)},
                    Wanted{rank, 1});
  with_float(d.type, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulate_t<T>;
    const Type wide = sizeof(A) == sizeof(double) ? Type::f64 : Type::f32;
    A *quantile = queue.allocate_array<A>(1);
    launch("score", queue, logs<T>, blocks, block_threads, d);
    segment_rows({d.rows, wide, d.y, Reduction::moments, 0, table}, queue);
    launch("score", queue, merge_rows, 1, 32, d, table, all, rank);
    kth({d.rows, wide, d.y, nullptr, {rank}, 1}, quantile, queue);
    launch("score", queue, distances<A>, blocks, block_threads, d, all, quantile);
  });
}

void score_bounds(const ScoreBounds &s, Queue &queue) {
  launch("score", queue, s.type == Type::f64 ? bounds<double> : bounds<float>, ceil_div(s.size, block_tokens),
         block_threads, s);
}

void score_factor(const ScoreFactor &s, Queue &queue) {
  const int64_t tiles = tiles_of(s.rows.size);
  launch("score", queue, s.type == Type::f64 ? factors<double> : factors<float>,
         ceil_div(tiles, warps_per_block), block_threads, s, tiles);
}

} // namespace tokcredit::cuda
