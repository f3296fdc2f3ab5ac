// What the policy loss reports of a row, and how the lanes of a warp sum it up.
#pragma once
#include "cuda/tile.cuh"
#include "ops/policy_loss.hpp"

namespace tokcredit::cuda {

struct Stats {
  double sum[loss_stats];

  __device__ void merge(const Stats &other) {
#pragma unroll
    for (int c = 0; c < loss_stats; ++c)
      sum[c] += other.sum[c];
  }
};

// Over all lanes, the same number in each.
__device__ inline unsigned sum_lanes(unsigned x) { return unsigned(__reduce_add_sync(all_lanes, int(x))); }
__device__ inline double sum_lanes(double x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
    x += __shfl_xor_sync(all_lanes, x, step);
  return x;
}

// The stats of a lane. Counts share registers in pairs: those of a tile fit 16 bits.
struct Tally {
  double loss = 0, ratio = 0, divergence = 0;
  unsigned tokens = 0, below_above = 0, capped_nonfinite = 0;

  __device__ Stats total() const {
    const unsigned sides = sum_lanes(below_above), others = sum_lanes(capped_nonfinite);
    return {{sum_lanes(loss), double(sum_lanes(tokens)), double(sides & 0xffff), double(sides >> 16),
             double(others & 0xffff), sum_lanes(ratio), sum_lanes(divergence), double(others >> 16)}};
  }
};
static_assert(tile_size < 1 << 16, "counts do not run into each other");

} // namespace tokcredit::cuda
