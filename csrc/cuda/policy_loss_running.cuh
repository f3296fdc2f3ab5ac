// Log-ratios that are sums along the row, and positions in it: what a row has summed up before a tile, and
// the sums up to each token of it.
#pragma once
#include "cuda/chain.cuh"
#include "cuda/lane.cuh"
#include "cuda/policy_loss_call.cuh"

namespace tokcredit::cuda {

// What a row has summed up so far.
struct Running {
  double log_ratio = 0;
  long long position = 0;

  __device__ Running then(const Running &next) const {
    return {log_ratio + next.log_ratio, position + next.position};
  }
};

// The differences of a row's tokens in a tile, sixteen neighbours per lane, and their sums. Tokens of other
// rows and masked ones count as 0.
template <class T> struct Differences {
  using A = accumulate_t<T>;
  A each[own_tokens];
  double before = 0; // the sum over all tokens before the lane's
  double total = 0;
  unsigned live;      // the lane's tokens that take part, as bits
  unsigned usual = 0; // a bit for each plain step in which all are finite and within the bound

  // `plain` has a bit for each step that lies in [first, last) of the tile, its tokens all live.
  __device__ Differences(const PolicyLoss &p, const Call<A> &call, const Taking &taking, unsigned plain,
                         int64_t from, int first, int last) {
    const int64_t t = from + own_tokens * lane_id();
    const bool whole = plain == (1u << tile_steps) - 1;
    live = whole ? own_all : taking.live_neighbours() & bits_between(first, last);
    if (p.source != Source::cumulative)
      return;
    Own<T> log_probs, reference;
    load_own(static_cast<const T *>(p.log_probs), nullptr, t, p.rows.size, log_probs);
    load_own(static_cast<const T *>(p.reference), nullptr, t, p.rows.size, reference);
#pragma unroll
    for (int k = 0; k < own_tokens; ++k)
      each[k] = load(log_probs[k]) - load(reference[k]);
    if (!whole) {
#pragma unroll
      for (int k = 0; k < own_tokens; ++k)
        each[k] = live >> k & 1 ? each[k] : A(0);
    }
    bool within = true;
#pragma unroll
    for (int k = 0; k < own_tokens; ++k)
      within &= std::fabs(each[k]) <= call.usual_bound;
    if (!within) {
#pragma unroll
      for (int k = 0; k < own_tokens; ++k)
        each[k] = bounded(each[k], -call.bound, call.bound);
    }
    const unsigned unusual = __ballot_sync(all_lanes, !within);
#pragma unroll
    for (int step = 0; step < tile_steps; ++step)
      usual |= unsigned((unusual >> step * step_lanes & ((1u << step_lanes) - 1)) == 0) << step;
    usual &= plain;
    double through = double(each[0]);
#pragma unroll
    for (int k = 1; k < own_tokens; ++k)
      through += double(each[k]);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const double below = __shfl_up_sync(all_lanes, through, unsigned(distance));
      if (lane_id() >= distance)
        through += below;
    }
    const double below = __shfl_up_sync(all_lanes, through, 1u);
    before = lane_id() ? below : 0;
    total = __shfl_sync(all_lanes, through, 31);
  }

  // The sums up to each token, after `start`.
  __device__ void leave(double start, Staged<A> &sums) const {
    double upto = start + before;
    __syncwarp(); // all lanes have read those of the row before
#pragma unroll
    for (int v = 0; v < own_tokens; v += quad) {
      Quad<A> four;
#pragma unroll
      for (int k = 0; k < quad; ++k)
        four.item[k] = A(upto += double(each[v + k]));
      *reinterpret_cast<Quad<A> *>(sums.own(lane_id()) + v) = four;
    }
    __syncwarp();
  }

  static constexpr int step_lanes = int(step_size) / own_tokens; // that have the tokens of a step
};

} // namespace tokcredit::cuda
