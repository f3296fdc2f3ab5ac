// The clipped surrogate in whole steps: 128 tokens of a row that all train, four neighbours per lane, with
// log-ratios that are finite and inside the clamp. Nothing has to be asked for each token then, and what is
// the same for all tokens of a row is multiplied in at its end.
#pragma once
#include "cuda/policy_loss_call.cuh"
#include "cuda/policy_loss_stats.cuh"

namespace tokcredit::cuda {

// exp(x) for |x| <= 80, within 2 ulp; for lower numbers 0 in the end.
__device__ inline float usual_exponential(float x) {
#ifdef __CUDA_ARCH__
  // 2^h for h = x / ln(2) rounded, times 1 + what rounding left out.
  const float h = x * 1.44269504f, left = fmaf(h, 1.90465421e-9f, fmaf(h, -0.693147182f, x));
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(h));
  return fmaf(power, left, power);
#else
  return exponential(x);
#endif
}
__device__ inline double usual_exponential(double x) { return exponential(x); }

// `moving` where x lies in [low, high], else 0. Counts those and the ones that lie below. Five instructions,
// where the compiler would make more.
__device__ inline float within_bounds(float x, float low, float high, float moving, unsigned &below,
                                      unsigned &inside) {
#ifdef __CUDA_ARCH__
  float out;
  asm("{\n\t.reg .pred reaches, moves;\n\t"
      "setp.ge.f32 reaches, %3, %4;\n\t"
      "setp.le.and.f32 moves, %3, %5, reaches;\n\t"
      "@!reaches add.u32 %1, %1, 1;\n\t"
      "@moves add.u32 %2, %2, 1;\n\t"
      "selp.f32 %0, %6, 0f00000000, moves;\n\t}"
      : "=f"(out), "+r"(below), "+r"(inside)
      : "f"(x), "f"(low), "f"(high), "f"(moving));
  return out;
#else
  const bool reaches = x >= low, moves = reaches && x <= high;
  below += !reaches;
  inside += moves;
  return moves ? moving : 0;
#endif
}
__device__ inline double within_bounds(double x, double low, double high, double moving, unsigned &below,
                                       unsigned &inside) {
  const bool reaches = x >= low, moves = reaches & (x <= high);
  below += reaches ? 0 : 1;
  inside += moves ? 1 : 0;
  return moves ? moving : 0;
}

// The bounds of `clip` and the ratios at them, for tokens that share them.
template <class A> struct Bounds {
  A low, high, cap, at_low, at_high, at_cap;

  __device__ explicit Bounds(const OfRow<A> &row)
      : low(row.low), high(row.high), cap(row.cap), at_low(exponential(low)), at_high(exponential(high)),
        at_cap(exponential(cap)) {}
};

// The bounds for an advantage: by its sign one lower and one upper bound can stop a token.
template <class A> struct SignedClip {
  A low, high, at_low, at_high;
  bool caps; // `high` is the cap

  __device__ explicit SignedClip(const OfRow<A> &row)
      : low(pick(row.advantage, row.low, -A(INFINITY), -A(INFINITY))),
        high(pick(row.advantage, row.cap, row.high, A(INFINITY))), at_low(exponential(low)),
        at_high(exponential(high)), caps(row.advantage < A(0)) {}
  __device__ SignedClip(A advantage, const Bounds<A> &b)
      : low(pick(advantage, b.low, -A(INFINITY), -A(INFINITY))),
        high(pick(advantage, b.cap, b.high, A(INFINITY))), at_low(b.at_low),
        at_high(advantage < A(0) ? b.at_cap : b.at_high), caps(advantage < A(0)) {}

  static __device__ A pick(A advantage, A negative, A positive, A other) {
    return advantage < A(0) ? negative : advantage > A(0) ? positive : other;
  }
};

// Whole steps of a row whose tokens share advantage and weight.
template <class A> struct RowClip {
  const SignedClip<A> at;
  const A factor; // of the slope
  // Sums over the lane's tokens: ratios less 1, these where the bounds stop them, log-ratios.
  A excess = 0, stopped = 0, log_ratio = 0;
  unsigned tokens = 0, below = 0, inside = 0;

  __device__ RowClip(const Call<A> &, const OfRow<A> &row) : at(row), factor(-row.advantage * row.weight) {}

  // Whether the row can be taken so.
  __device__ bool usual() const { return factor - factor == A(0) && at.low <= at.high; }

  __device__ void take(const A (&x)[quad], A (&slope)[quad]) {
    const A least = at.at_low - A(1), most = at.at_high - A(1);
#pragma unroll
    for (int k = 0; k < quad; ++k) {
      const A q = usual_exponential(x[k]), less = q - A(1);
      excess += less;
      stopped += min(max(less, least), most);
      log_ratio += x[k];
      slope[k] = within_bounds(x[k], at.low, at.high, factor * q, below, inside);
    }
    tokens += quad;
  }

  __device__ void add_to(Tally &tally) const {
    const unsigned above = tokens - below - inside;
    tally.loss += double(factor) * (tokens + double(stopped));
    tally.ratio += tokens + double(excess);
    tally.divergence += double(excess) - double(log_ratio);
    tally.tokens += tokens;
    tally.below_above += below | (at.caps ? 0 : above << 16);
    tally.capped_nonfinite += at.caps ? above : 0;
  }
};

// Whole steps of tokens with advantages and weights of their own.
template <class A> struct TokenClip {
  const Bounds<A> bounds;
  A loss = 0, excess = 0, log_ratio = 0; // sums; of ratios less 1
  unsigned tokens = 0, below_above = 0, capped = 0;

  __device__ TokenClip(const Call<A> &, const OfRow<A> &row) : bounds(row) {}

  __device__ bool usual() const { return true; }

  __device__ void take(const A (&x)[quad], const A (&advantage)[quad], const A (&factor)[quad],
                       A (&slope)[quad]) {
#pragma unroll
    for (int k = 0; k < quad; ++k) {
      const SignedClip<A> at(advantage[k], bounds);
      const A q = usual_exponential(x[k]);
      const bool below = x[k]<at.low, above = x[k]> at.high;
      A stopped = below ? at.at_low : q;
      stopped = above ? at.at_high : stopped;
      loss += factor[k] * stopped;
      excess += q - A(1);
      log_ratio += x[k];
      below_above += (below ? 1u : 0u) + (above && !at.caps ? 1u << 16 : 0u);
      capped += above && at.caps ? 1u : 0u;
      slope[k] = below | above ? A(0) : factor[k] * q;
    }
    tokens += quad;
  }

  __device__ void add_to(Tally &tally) const {
    tally.loss += double(loss);
    tally.ratio += tokens + double(excess);
    tally.divergence += double(excess) - double(log_ratio);
    tally.tokens += tokens;
    tally.below_above += below_above;
    tally.capped_nonfinite += capped;
  }
};

// Whole steps of a row whose tokens share the log-ratio as well: its log-probs are only looked at.
template <class A> struct AlikeClip {
  A slope, value, ratio, divergence;
  bool below, above, caps;
  unsigned tokens = 0;

  __device__ AlikeClip(const Call<A> &call, const OfRow<A> &row) {
    const SignedClip<A> at(row);
    const A x = bounded(row.log_ratio, call.clamp_low, call.clamp_high), factor = -row.advantage * row.weight;
    ratio = exponential(x);
    below = x<at.low, above = x> at.high, caps = at.caps;
    value = factor * (above ? at.at_high : below ? at.at_low : ratio);
    slope = below | above | (x != row.log_ratio) ? A(0) : factor * ratio;
    divergence = ratio - A(1) - x;
  }

  __device__ bool usual() const { return value - value == A(0) && divergence - divergence == A(0); }

  __device__ void add_to(Tally &tally) const {
    tally.loss += tokens * double(value);
    tally.ratio += tokens * double(ratio);
    tally.divergence += tokens * double(divergence);
    tally.tokens += tokens;
    tally.below_above += (below ? tokens : 0) | (above && !caps ? tokens << 16 : 0);
    tally.capped_nonfinite += above && caps ? tokens : 0;
  }
};

} // namespace tokcredit::cuda
