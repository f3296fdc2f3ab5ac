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

// The stats of a lane. Counts share registers in pairs: those of a tile fit 16 bits.
struct Tally {
  double loss = 0, ratio = 0, divergence = 0;
  unsigned tokens = 0, below_above = 0, capped_nonfinite = 0;

  // Over all lanes, the stat with the lane's number in each, modulo eight.
  __device__ double total() const {
    const int lane = lane_id();
    // Even lanes add up losses and odd ones ratios, then two of four divergences.
    const bool odd = lane & 1, upper = lane & 2;
    const double pair = (odd ? ratio : loss) + __shfl_xor_sync(all_lanes, odd ? loss : ratio, 1);
    const double other = divergence + __shfl_xor_sync(all_lanes, divergence, 1);
    double sum = (upper ? other : pair) + __shfl_xor_sync(all_lanes, upper ? pair : other, 2);
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
      sum += __shfl_xor_sync(all_lanes, sum, step);
    const unsigned all = sum_lanes(tokens), sides = sum_lanes(below_above),
                   others = sum_lanes(capped_nonfinite);
    const int stat = lane % loss_stats;
    const unsigned counts = stat == int(LossStat::tokens)  ? all
                            : stat < int(LossStat::capped) ? sides
                                                           : others;
    constexpr unsigned sums =
        1u << int(LossStat::loss) | 1u << int(LossStat::ratio) | 1u << int(LossStat::divergence);
    return sums >> stat & 1 ? sum : double(odd && upper ? counts >> 16 : counts & 0xffff);
  }
};
static_assert(int(LossStat::loss) % 4 == 0 && int(LossStat::ratio) % 4 == 1 &&
                  int(LossStat::divergence) % 4 == 2 && int(LossStat::above) % 4 == 3 &&
                  int(LossStat::nonfinite) % 4 == 3 && loss_stats == 8,
              "lanes have what is stored at their place");
static_assert(tile_size < 1 << 16, "counts do not run into each other");

} // namespace tokcredit::cuda
