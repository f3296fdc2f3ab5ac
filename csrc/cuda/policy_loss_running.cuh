// Log-ratios that are sums along the row, and positions in it: what a row has summed up before a tile, and
// the sums up to each token of it.
#pragma once
#include "cuda/chain.cuh"
#include "cuda/policy_loss_call.cuh"
#include "cuda/policy_loss_stats.cuh"

namespace tokcredit::cuda {

// What a row has summed up so far.
struct Running {
  double log_ratio = 0;
  long long position = 0;

  __device__ Running then(const Running &next) const {
    return {log_ratio + next.log_ratio, position + next.position};
  }
};

// Adds what the lane `distance` below has, if there is one.
__device__ inline void add_from_below(double &to, double from, int distance) {
#ifdef __CUDA_ARCH__
  asm volatile("{ .reg .pred p; .reg .b32 low, high; .reg .f64 below;\n"
               "  mov.b64 {low, high}, %1;\n"
               "  shfl.sync.up.b32 low|p, low, %2, 0, -1;\n"
               "  shfl.sync.up.b32 high|p, high, %2, 0, -1;\n"
               "  mov.b64 below, {low, high};\n"
               "  @p add.f64 %0, %0, below; }"
               : "+d"(to)
               : "d"(from), "r"(distance));
#else
  const double below = __shfl_up_sync(all_lanes, from, unsigned(distance));
  if (lane_id() >= distance)
    to += below;
#endif
}

// Up to and including each lane.
__device__ inline double scan_lanes(double upto) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
    add_from_below(upto, upto, step);
  return upto;
}

// The differences of a row's tokens in a tile, four neighbours of each step per lane, and their sums. Tokens
// of other rows and masked ones count as 0.
template <class T> struct Differences {
  using A = accumulate_t<T>;
  A each[tile_steps][quad];
  double before[tile_steps]; // the sum over all tokens before the lane's
  double total = 0;
  unsigned usual = 0; // a bit for each plain step in which all are finite and within the bound

  // `plain` has a bit for each step of which all tokens are live, `live` one for each of the lane's tokens.
  // `room` is for the numbers of a tile.
  __device__ Differences(const PolicyLoss &p, const Call<A> &call, const Taking &taking, unsigned plain,
                         int64_t from, int first, int last, A *room) {
    const T *log_probs = static_cast<const T *>(p.log_probs),
            *reference = static_cast<const T *>(p.reference);
    if (p.source != Source::cumulative)
      return;
    __syncwarp(); // all lanes have read those of the row before
#pragma unroll 1
    for (int token = 0; token < int(tile_size); token += 32) {
      if (plain >> token / int(step_size) & 1)
        continue;
      const int own = token + lane_id();
      const bool live = taking.of(own) & 1 && own >= first && own < last;
      room[own] = live ? load(log_probs[from + own]) - load(reference[from + own]) : A(0);
    }
    __syncwarp();
#pragma unroll
    for (int step = 0; step < tile_steps; ++step) {
      const int own = step * int(step_size) + quad * lane_id();
      A(&d)[quad] = each[step];
      if (plain >> step & 1) {
        A other[quad];
        load_four(log_probs + from + own, d);
        load_four(reference + from + own, other);
#pragma unroll
        for (int k = 0; k < quad; ++k)
          d[k] -= other[k];
      } else {
        load_four(room + own, d);
      }
      bool within = true;
#pragma unroll
      for (int k = 0; k < quad; ++k)
        within &= std::fabs(d[k]) <= call.usual_bound;
      if (__all_sync(all_lanes, within)) {
        usual |= 1u << step;
      } else {
#pragma unroll
        for (int k = 0; k < quad; ++k)
          d[k] = bounded(d[k], -call.bound, call.bound);
      }
      double sum = double(d[0]);
#pragma unroll
      for (int k = 1; k < quad; ++k)
        sum += double(d[k]);
      const double through = scan_lanes(sum);
      before[step] = total;
      add_from_below(before[step], through, 1);
      total += __shfl_sync(all_lanes, through, 31);
    }
    usual &= plain;
  }

  // The sums up to each token, after `start`.
  __device__ void leave(double start, A *sums) const {
    __syncwarp();
#pragma unroll
    for (int step = 0; step < tile_steps; ++step) {
      double upto = start + before[step];
      Quad<A> four;
#pragma unroll
      for (int k = 0; k < quad; ++k)
        four.item[k] = A(upto += double(each[step][k]));
      *reinterpret_cast<Quad<A> *>(sums + step * step_size + quad * lane_id()) = four;
    }
    __syncwarp();
  }
};

} // namespace tokcredit::cuda
