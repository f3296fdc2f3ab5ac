// The tokens of one row in one tile, evaluated four neighbours per lane where a whole step of the warp
// trains, else one per lane.
#pragma once
#include "cuda/lane.cuh"
#include "cuda/policy_loss_row.cuh"
#include <type_traits>

namespace tokcredit::cuda {

// Tokens of a lane. Four neighbours in a plain step, in which all tokens of the warp train and lie in one
// row, so that nothing is asked for each; else one of 32 that the warp takes at once.
template <int n> struct Few {
  static constexpr int count = n;
  static constexpr bool plain = n == quad;
  int64_t t; // the first
  bool here; // in the row
  bool live, trained;
};

// Their log-probs under two policies.
template <class A, int n> struct Pairs {
  A log_prob[n]{}, reference[n]{};
  A difference[n]{}; // the given log-ratio where there is no reference
};

// What the tokens of a plain step may have of their own: operands, log-probs, the latter only because all
// have the log-ratio of the row, or log-ratios and bounds that depend on the tokens before.
enum class Steps { operands, log_probs, alike, running };

template <Surrogate kind, class T, Steps steps> struct Piece {
  using A = accumulate_t<T>;
  static constexpr bool rowwise = steps != Steps::operands, running = steps == Steps::running;
  static constexpr bool shared = steps == Steps::log_probs && std::is_same_v<A, float> &&
                                 (kind == Surrogate::soft || kind == Surrogate::k1);
  const PolicyLoss &p;
  const Call<A> &call;
  const Taking &taking;
  const int64_t from;    // of the tile
  const int first, last; // in it
  const OfRow<A> row;
  Staged<A> *sums = nullptr; // up to each token of the tile, where the log-ratio is cumulative
  long long position = 0;    // of the token before
  unsigned plain;            // steps, as bits

  __device__ Piece(const PolicyLoss &p, const Call<A> &call, const Taking &taking, int64_t r, int64_t from,
                   int first, int last)
      : p(p), call(call), taking(taking), from(from), first(first), last(last), row(call, r),
        plain(call.plain ? taking.whole & inside(first, last) : 0) {}

  // The steps that lie in [first, last) with all their tokens, as bits.
  static __device__ unsigned inside(int first, int last) {
    const int from = (first + int(step_size) - 1) / int(step_size), to = last / int(step_size);
    return from < to ? (1u << to) - (1u << from) : 0;
  }

  template <int n> static __device__ void load_log_probs(const void *x, int64_t t, A (&out)[n]) {
    const T *at = static_cast<const T *>(x) + t;
    if constexpr (n == 1)
      out[0] = load(*at);
    else
      load_four(at, out);
  }
  template <int n> __device__ void read(const Operand &operand, A of_row, int64_t t, A (&out)[n]) const {
    if (!(rowwise && n == quad) && per_token(operand)) {
      const A *at = static_cast<const A *>(operand.data) + t;
      if constexpr (n == 1)
        out[0] = *at;
      else
        load_four(at, out);
      return;
    }
#pragma unroll
    for (int k = 0; k < n; ++k)
      out[k] = of_row;
  }
  // In a plain step these are the same for all tokens.
  template <int n> __device__ A read(const Operand &operand, A of_row, const Few<n> &own) const {
    return !own.plain && per_token(operand) ? static_cast<const A *>(operand.data)[own.t] : of_row;
  }

  template <int n> __device__ Pairs<A, n> pairs_of(const Few<n> &own) const {
    Pairs<A, n> out;
    if (!own.live)
      return out;
    load_log_probs(p.log_probs, own.t, out.log_prob);
    if (p.reference) {
      load_log_probs(p.reference, own.t, out.reference);
#pragma unroll
      for (int k = 0; k < n; ++k)
        out.difference[k] = out.log_prob[k] - out.reference[k];
    } else if (p.source == Source::given) {
      read(p.log_ratio, row.log_ratio, own.t, out.difference);
    }
    return out;
  }

  // Evaluates tokens.
  template <int n> __device__ void take(const Few<n> &own, Tally &tally) {
    const Pairs<A, n> pairs = pairs_of(own);
    A raw[n], width = 1, slope[n]{};
#pragma unroll
    for (int k = 0; k < n; ++k)
      raw[k] = pairs.difference[k];
    if constexpr (running) {
      if (p.source == Source::cumulative) {
#pragma unroll
        for (int k = 0; k < n; ++k)
          raw[k] = own.here ? sums->at(int(own.t - from) + k) : A(0);
      }
      if (!own.plain && p.power != 0) {
        const unsigned live = __ballot_sync(all_lanes, own.live);
        width = growth(A(position + __popc(live & ((2u << lane_id()) - 1))), A(p.power));
        position += __popc(live);
      }
    }
    if (own.trained) {
      A advantages[n], weights[n];
      read(p.advantages, row.advantage, own.t, advantages);
      read(p.weights, row.weight, own.t, weights);
      const A low = read(p.low, row.low, own) * width, high = read(p.high, row.high, own) * width,
              cap = read(p.cap, row.cap, own) * width;
      A share_low = 0, share_high = 0, divergence_given = 0;
      if constexpr (kind == Surrogate::gated) {
        share_low = read(p.outside_low, row.outside_low, own);
        share_high = read(p.outside_high, row.outside_high, own);
        divergence_given = read(p.given, row.given, own);
      }
      if (p.source == Source::given)
        read(p.log_ratio, row.log_ratio, own.t, raw);
      A loss = 0, ratio = 0, divergence = 0, finite = 0;
      unsigned sides = 0, capped = 0;
#pragma unroll
      for (int k = 0; k < n; ++k)
        finite += (pairs.difference[k] + pairs.log_prob[k]) * A(0);
      if (finite != A(0)) { // rarely: infinity or NaN
#pragma unroll
        for (int k = 0; k < n; ++k) {
          if (pairs.difference[k] != pairs.difference[k])
            weights[k] = pairs.difference[k]; // NaN, also where the log-ratio is given
          if (pairs.log_prob[k] - pairs.log_prob[k] != A(0))
            capped += 1u << 16;
        }
      }
#pragma unroll
      for (int k = 0; k < n; ++k) {
        Outcome<A> out =
            surrogate<kind>(Token<A>{raw[k], pairs.difference[k], pairs.log_prob[k], pairs.reference[k],
                                     advantages[k], low, high, cap, share_low, share_high, divergence_given},
                            p);
        spread_nan(out, p.reference ? pairs.difference[k] : pairs.log_prob[k]);
        slope[k] = weights[k] * out.slope;
        loss += weights[k] * out.value;
        ratio += out.ratio;
        divergence += out.ratio - A(1) - out.log_ratio;
        if (out.below)
          sides += 1u;
        if (out.above)
          sides += 1u << 16;
        if (out.capped)
          capped += 1u;
      }
      tally.tokens += n;
      tally.below_above += sides;
      tally.capped_nonfinite += capped;
      tally.loss += double(loss);
      tally.ratio += double(ratio);
      tally.divergence += double(divergence);
    }
    if (own.here)
      store_slopes(own.t, slope);
  }

  template <int n> __device__ void store_slopes(int64_t t, const A (&slope)[n]) const {
    A *slopes = static_cast<A *>(p.slopes);
    if (!slopes)
      return;
    if constexpr (n == quad)
      store_whole(slopes + t, Quad<A>{{slope[0], slope[1], slope[2], slope[3]}});
    else
      slopes[t] = slope[0];
  }

  // Four tokens of a plain step; false, and nothing done, if one of the warp's needs to be asked for more.
  __device__ bool take_clipped(int64_t t, AlikeClip<A> &clip) const {
    A x[quad];
    load_log_probs(p.log_probs, t, x);
    if (p.reference)
      subtract_reference(t, x);
    if (!all_within(x, call.largest))
      return false;
    clip.tokens += quad;
    const A slope[quad] = {clip.slope, clip.slope, clip.slope, clip.slope};
    store_slopes(t, slope);
    return true;
  }

  __device__ bool take_clipped(int64_t t, RowClip<A> &clip) const {
    A x[quad], slope[quad];
    load_log_probs(p.log_probs, t, x);
    subtract_reference(t, x);
    if (!all_within(x, call.reach))
      return false;
    clip.take(x, slope);
    store_slopes(t, slope);
    return true;
  }
  template <class Row> __device__ bool take_shared(int64_t t, Row &own) const {
    A x[quad], slope[quad];
    load_log_probs(p.log_probs, t, x);
    subtract_reference(t, x);
    if (!own.take(x, are_within(x, call.reach), slope))
      return false;
    store_slopes(t, slope);
    return true;
  }
  __device__ bool take_clipped(int64_t t, TokenClip<A> &clip) const {
    A x[quad], advantage[quad], factor[quad], slope[quad];
    load_log_probs(p.log_probs, t, x);
    if (p.reference)
      subtract_reference(t, x);
    if (!call.different) {
      if (!all_within(x, call.largest))
        return false;
      if (p.source == Source::given)
        read(p.log_ratio, row.log_ratio, t, x);
      else
        read({}, A(0), t, x);
    }
    read(p.advantages, row.advantage, t, advantage);
    read(p.weights, row.weight, t, factor);
#pragma unroll
    for (int k = 0; k < quad; ++k)
      factor[k] *= -advantage[k];
    if (!all_within(x, call.reach) || !all_within(factor, call.largest))
      return false;
    clip.take(x, advantage, factor, slope);
    store_slopes(t, slope);
    return true;
  }

  __device__ void subtract_reference(int64_t t, A (&x)[quad]) const {
    A reference[quad];
    load_log_probs(p.reference, t, reference);
#pragma unroll
    for (int k = 0; k < quad; ++k)
      x[k] -= reference[k];
  }

  // Not if one is NaN.
  static __device__ bool are_within(const A (&x)[quad], A bound) {
    bool within = true;
#pragma unroll
    for (int k = 0; k < quad; ++k)
      within &= std::fabs(x[k]) <= bound;
    return within;
  }
  // All tokens of the warp.
  static __device__ bool all_within(const A (&x)[quad], A bound) {
    return __all_sync(all_lanes, are_within(x, bound));
  }

  __device__ void take_singly(int step, Tally &tally) {
    constexpr int size = int(step_size);
    for (int token = step * size; token < min((step + 1) * size, last); token += 32) {
      const unsigned bits = taking.of(token + lane_id());
      const bool here = token + lane_id() >= first && token + lane_id() < last;
      take(Few<1>{from + token + lane_id(), here, here && bits & 1, here && bits & 2}, tally);
    }
  }

  // Calls body(t) for the plain steps, which takes those away for which it is false.
  template <class Body> __device__ void each_plain(Body &&body) {
    int64_t t = from + quad * lane_id();
#pragma unroll 1
    for (int step = 0; step < tile_steps; ++step, t += step_size)
      if (plain >> step & 1 && !body(t))
        plain &= ~(1u << step);
  }

  template <class Clip> __device__ void take_clipped(Tally &tally) {
    Clip clip(call, row);
    if (!clip.usual()) { // infinity times no tokens would be NaN
      plain = 0;
      return;
    }
    each_plain([&](int64_t t) { return take_clipped(t, clip); });
    clip.add_to(tally);
  }

  __device__ void take_plain(Tally &tally) {
    each_plain([&](int64_t t) {
      take(Few<quad>{t, true, true, true}, tally);
      return true;
    });
  }

  // Leaves the log-ratios of a lane's sixteen tokens where all lanes find them. Steps with a token that is
  // not usual are plain no longer. The others' tokens are clipped at once, and their slopes are left instead.
  __device__ void take_sums(A (&x)[own_tokens], bool usual, Tally &tally) {
    if constexpr (kind == Surrogate::clip) {
#pragma unroll
      for (int k = 0; k < own_tokens; ++k)
        usual &= std::fabs(x[k]) <= call.reach;
    }
    const unsigned unusual = __ballot_sync(all_lanes, !usual);
#pragma unroll
    for (int step = 0; step < tile_steps; ++step)
      if (unusual >> step * step_lanes & ((1u << step_lanes) - 1))
        plain &= ~(1u << step);
    if constexpr (kind == Surrogate::clip) {
      RowClip<A> clip(call, row);
      if (!clip.usual()) {
        plain = 0;
      } else if (plain >> lane_id() / step_lanes & 1) {
#pragma unroll
        for (int v = 0; v < own_tokens; v += quad) {
          const A four[quad] = {x[v], x[v + 1], x[v + 2], x[v + 3]};
          A slope[quad];
          clip.take(four, slope);
#pragma unroll
          for (int k = 0; k < quad; ++k)
            x[v + k] = slope[k];
        }
        clip.add_to(tally);
      }
    }
    __syncwarp(); // all lanes have read those of the row before
#pragma unroll
    for (int v = 0; v < own_tokens; v += quad)
      *reinterpret_cast<Quad<A> *>(sums->own(lane_id()) + v) = {{x[v], x[v + 1], x[v + 2], x[v + 3]}};
    __syncwarp();
    if (kind == Surrogate::clip && p.slopes) {
      A *slopes = static_cast<A *>(p.slopes) + from + quad * lane_id();
      const auto store = [&](int step) { store_whole(slopes + step * step_size, sums->quad_of(step)); };
      if (plain == (1u << tile_steps) - 1) {
#pragma unroll
        for (int step = 0; step < tile_steps; ++step)
          store(step);
      } else {
#pragma unroll 1
        for (int step = 0; step < tile_steps; ++step)
          if (plain >> step & 1)
            store(step);
      }
    }
  }
  static constexpr int step_lanes = int(step_size) / own_tokens; // that have the tokens of a step

  // Evaluates all tokens but those that take_sums has.
  __device__ void evaluate(Tally &tally) {
    if constexpr (kind == Surrogate::clip) {
      if constexpr (!running)
        take_clipped<std::conditional_t<steps == Steps::alike, AlikeClip<A>,
                                        std::conditional_t<rowwise, RowClip<A>, TokenClip<A>>>>(tally);
    } else if constexpr (shared) {
      std::conditional_t<kind == Surrogate::soft, RowSoft, RowDivergence> own(p, row);
      if (call.different && own.usual()) {
        each_plain([&](int64_t t) { return take_shared(t, own); });
        own.add_to(tally);
      } else {
        take_plain(tally);
      }
    } else {
      take_plain(tally);
    }
    const unsigned here = (2u << (last - 1) / int(step_size)) - (1u << first / int(step_size));
    for (unsigned rest = here & ~plain; rest; rest &= rest - 1)
      take_singly(__ffs(int(rest)) - 1, tally);
  }
};

} // namespace tokcredit::cuda
