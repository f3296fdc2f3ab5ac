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

// own + x of the lane so far before this one; `own` where there is none.
__device__ inline double plus_before(double own, double x, int distance) {
#ifdef __CUDA_ARCH__
  asm volatile("{\n\t.reg .pred here;\n\t.reg .b32 low, high;\n\t.reg .f64 before;\n\t"
               "mov.b64 {low, high}, %1;\n\t"
               "shfl.sync.up.b32 low|here, low, %2, 0, 0xffffffff;\n\t"
               "shfl.sync.up.b32 high, high, %2, 0, 0xffffffff;\n\t"
               "mov.b64 before, {low, high};\n\t@here add.f64 %0, %0, before;\n\t}"
               : "+d"(own)
               : "d"(x), "r"(distance));
  return own;
#else
  const double before = __shfl_up_sync(all_lanes, x, unsigned(distance));
  return lane_id() >= distance ? own + before : own;
#endif
}

// The differences of a row's tokens in a tile, sixteen neighbours per lane, and their sums. Tokens of other
// rows and masked ones count as 0.
template <class T> struct Differences {
  using A = accumulate_t<T>;
  double upto[own_tokens]; // the sum over the lane's tokens up to each
  double through;          // the sum over all tokens up to the lane's last
  double total = 0;
  unsigned live;     // the lane's tokens that take part, as bits
  bool usual = true; // the lane's are finite and within the bound

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
    A each[own_tokens];
#pragma unroll
    for (int k = 0; k < own_tokens; ++k)
      each[k] = load(log_probs[k]) - load(reference[k]);
    if (!whole) {
#pragma unroll
      for (int k = 0; k < own_tokens; ++k)
        each[k] = live >> k & 1 ? each[k] : A(0);
    }
#pragma unroll
    for (int k = 0; k < own_tokens; ++k)
      usual &= std::fabs(each[k]) <= call.usual_bound;
    if (!usual) {
#pragma unroll
      for (int k = 0; k < own_tokens; ++k)
        each[k] = bounded(each[k], -call.bound, call.bound);
    }
    upto[0] = double(each[0]);
#pragma unroll
    for (int k = 1; k < own_tokens; ++k)
      upto[k] = upto[k - 1] + double(each[k]);
    through = upto[own_tokens - 1];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
      through = plus_before(through, through, distance);
    total = __shfl_sync(all_lanes, through, 31);
  }

  // The sums up to each of the lane's tokens, after `start`.
  __device__ void sums(double start, A (&out)[own_tokens]) const {
    const double before = plus_before(start, through, 1);
#pragma unroll
    for (int k = 0; k < own_tokens; ++k)
      out[k] = A(before + upto[k]);
  }
};

} // namespace tokcredit::cuda
