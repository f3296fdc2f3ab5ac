// One pass: each warp evaluates the pieces of rows in its tile. Where a token's ratio or window depends on
// the tokens before it, a row that came in from another tile waits for its sums there; sums over a row that
// meets several tiles are merged in order by a second, small kernel.
#include "cuda/chain.cuh"
#include "math/dispatch.hpp"
#include "math/surrogate.hpp"
#include "ops/policy_loss.hpp"
#include <type_traits>

namespace tokcredit::cuda {
namespace {

// What a row has summed up so far.
struct Running {
  double log_ratio = 0;
  long long position = 0;

  __device__ Running then(const Running &next) const {
    return {log_ratio + next.log_ratio, position + next.position};
  }
};

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

// Up to and including each lane.
template <class N> __device__ N scan_lanes(N upto) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const N before = __shfl_up_sync(all_lanes, upto, unsigned(step));
    if (lane_id() >= step)
      upto += before;
  }
  return upto;
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

__host__ __device__ inline bool per_token(const Operand &o) { return o.data && o.per == Per::token; }

// An operand that is the same along a row; of one per token nothing is read.
template <class A> struct RowOperand {
  const A *data; // null: `value` for every row
  int64_t rows;  // all bits, or none: then there is one number for all rows
  A value;

  RowOperand() = default;
  explicit RowOperand(const Operand &o)
      : data(per_token(o) ? nullptr : static_cast<const A *>(o.data)),
        rows(o.per == Per::row ? ~int64_t(0) : 0), value(A(o.value)) {}
  __device__ A at(int64_t row) const { return data ? data[row & rows] : value; }
};

constexpr int varying_count = 3; // the first, which may be per token where four tokens are taken at once
constexpr int operand_count = 9;

// Whether a token's ratio or window depends on the tokens before it.
inline bool chained(const PolicyLoss &p) { return p.source == Source::cumulative || p.power != 0; }

// What holds for all tokens of a call, in the type it is used in.
template <class A> struct Call {
  RowOperand<A> rows[operand_count];
  A bound, clamp_low, clamp_high;
  bool rowwise; // no operand is per token
  bool plain;   // four tokens may be taken at once

  Call(const PolicyLoss &p, bool aligned)
      : bound(A(p.bound)), clamp_low(A(p.clamp_low)), clamp_high(A(p.clamp_high)), rowwise(true),
        plain(aligned && quads_aligned(static_cast<const A *>(p.slopes)) && p.reference) {
    const Operand *const operands[operand_count] = {&p.advantages,  &p.weights,      &p.log_ratio,
                                                    &p.low,         &p.high,         &p.cap,
                                                    &p.outside_low, &p.outside_high, &p.given};
    for (int i = 0; i < operand_count; ++i) {
      const Operand &o = *operands[i];
      rows[i] = RowOperand<A>(o);
      if (per_token(o)) {
        rowwise = false;
        plain &= quads_aligned(static_cast<const A *>(o.data)) && i < varying_count;
      }
    }
    if (chained(p))
      plain &= rowwise && p.power == 0;
  }
};

// The operands of a row; a lane reads one of them.
template <class A> struct OfRow {
  A advantage, weight, low, high, cap, log_ratio, outside_low, outside_high, given;

  __device__ OfRow(const Call<A> &call, int64_t row) {
    const A own = lane_id() < operand_count ? call.rows[lane_id()].at(row) : A(0);
    const auto from = [&](int lane) { return __shfl_sync(all_lanes, own, lane); };
    advantage = from(0), weight = from(1), log_ratio = from(2), low = from(3), high = from(4), cap = from(5),
    outside_low = from(6), outside_high = from(7), given = from(8);
  }
};

// Which tokens of a tile take part.
struct Taking {
  unsigned bits;  // of the lane's tokens as tile_bits has them: of those that are live, above them that train
  unsigned whole; // a bit for each step of the warp: all its tokens train

  __device__ Taking(const PolicyLoss &p, int64_t from) : whole(0) {
    constexpr unsigned tile = (1u << tile_lane) - 1, four = (1u << quad) - 1;
    const unsigned live = tile_bits(p.rows.mask, from, p.rows.size) & tile;
    const unsigned trained = tile_bits(p.trains, from, p.rows.size) & live;
    bits = live | trained << tile_lane;
#pragma unroll
    for (int step = 0; step < int(tile_size / step_size); ++step)
      whole |= unsigned(__all_sync(all_lanes, (~trained >> step * quad & four) == 0)) << step;
  }

  // The bits of a token of the tile, which another lane may have: live, trained; by the whole warp.
  __device__ unsigned of(int token) const {
    const unsigned found = __shfl_sync(all_lanes, bits, token % int(step_size) / quad) >>
                           (token / int(step_size) * quad + token % quad);
    return (found & 1) | (found >> tile_lane & 1) << 1;
  }

  static constexpr int tile_lane = int(tile_size / 32); // tokens of a lane
  static_assert(2 * tile_lane <= 32, "live and trained share a register");
};

// Tokens of a lane. Four neighbours in a plain step, in which all tokens of the warp train and lie in one
// row, so that nothing is asked for each; else one of 32 that the warp takes at once.
template <int n> struct Own {
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

// The tokens of one row in one tile. With `rowwise` no operand is per token in a plain step.
template <Surrogate kind, class T, bool running, bool rowwise> struct Piece {
  using A = accumulate_t<T>;
  const PolicyLoss &p;
  const Call<A> &call;
  const Taking &taking;
  const int64_t from;    // of the tile
  const int first, last; // in it
  const unsigned plain;  // steps, as bits
  const OfRow<A> row;
  const std::conditional_t<rowwise, SignedClip<A>, Bounds<A>> clip;

  __device__ Piece(const PolicyLoss &p, const Call<A> &call, const Taking &taking, int64_t r, int64_t from,
                   int first, int last)
      : p(p), call(call), taking(taking), from(from), first(first), last(last),
        plain(call.plain ? taking.whole & inside(first, last) : 0), row(call, r), clip(clip_of(row)) {}

  static __device__ auto clip_of(const OfRow<A> &row) {
    if constexpr (rowwise)
      return SignedClip<A>(row.advantage, row.low, row.high, row.cap);
    else
      return Bounds<A>(row.low, row.high, row.cap);
  }

  // The steps that lie in [first, last) with all their tokens, as bits.
  static __device__ unsigned inside(int first, int last) {
    const int from = (first + int(step_size) - 1) / int(step_size), to = last / int(step_size);
    return from < to ? (1u << to) - (1u << from) : 0;
  }

  // Calls body(own) for all tokens in order.
  template <class Body> __device__ void each(Body &&body) const {
    constexpr int size = int(step_size);
    int step = first / size;
    int64_t t = from + step * size + quad * lane_id();
    for (; step * size < last; ++step, t += size) {
      if (plain >> step & 1) {
        body(Own<quad>{t, true, true, true});
        continue;
      }
      for (int token = step * size; token < min((step + 1) * size, last); token += 32) {
        const unsigned bits = taking.of(token + lane_id());
        const bool here = token + lane_id() >= first && token + lane_id() < last;
        body(Own<1>{from + token + lane_id(), here, here && bits & 1, here && bits & 2});
      }
    }
  }

  template <class X, int n> static __device__ void load_items(const void *x, int64_t t, A (&out)[n]) {
    const X *at = static_cast<const X *>(x) + t;
    if constexpr (n == 1) {
      out[0] = load(*at);
    } else {
      const Quad<X> four = *reinterpret_cast<const Quad<X> *>(at);
#pragma unroll
      for (int k = 0; k < n; ++k)
        out[k] = load(four.item[k]);
    }
  }
  template <int n>
  __device__ void read(const Operand &operand, A of_row, const Own<n> &own, A (&out)[n]) const {
    if (!(rowwise && own.plain) && per_token(operand))
      return load_items<A>(operand.data, own.t, out);
#pragma unroll
    for (int k = 0; k < n; ++k)
      out[k] = of_row;
  }
  // In a plain step these are the same for all tokens.
  template <int n> __device__ A read(const Operand &operand, A of_row, const Own<n> &own) const {
    return !own.plain && per_token(operand) ? static_cast<const A *>(operand.data)[own.t] : of_row;
  }

  template <int n> __device__ Pairs<A, n> pairs_of(const Own<n> &own) const {
    Pairs<A, n> out;
    if (!own.live)
      return out;
    load_items<T>(p.log_probs, own.t, out.log_prob);
    if (own.plain || p.reference) {
      load_items<T>(p.reference, own.t, out.reference);
#pragma unroll
      for (int k = 0; k < n; ++k)
        out.difference[k] = out.log_prob[k] - out.reference[k];
    } else if (p.source == Source::given) {
      read(p.log_ratio, row.log_ratio, own, out.difference);
    }
    return out;
  }

  // The sums within the lane's tokens, each difference within the bound.
  template <int n>
  __device__ void sum_bounded(const Own<n> &own, const Pairs<A, n> &pairs, double (&upto)[n]) const {
    double sum = 0;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      if (own.live)
        sum += double(bounded(pairs.difference[k], -call.bound, call.bound));
      upto[k] = sum;
    }
  }

  // What the piece adds to the row's sums.
  __device__ Running total() const {
    double log_ratio = 0;
    unsigned position = 0;
    each([&](auto own) {
      constexpr int n = own.count;
      position += own.live ? n : 0;
      if (p.source == Source::cumulative) {
        double upto[n];
        sum_bounded(own, pairs_of(own), upto);
        log_ratio += upto[n - 1];
      }
    });
    return {sum_lanes(log_ratio), int64_t(sum_lanes(position))};
  }

  // Evaluates tokens, up to which the row has the sums `in`.
  template <int n> __device__ void take(const Own<n> &own, Running &in, Tally &tally) const {
    const Pairs<A, n> pairs = pairs_of(own);
    A raw[n], width = 1, slope[n]{};
#pragma unroll
    for (int k = 0; k < n; ++k)
      raw[k] = pairs.difference[k];
    if constexpr (running) {
      if (p.source == Source::cumulative) {
        double upto[n];
        sum_bounded(own, pairs, upto);
        const double through = scan_lanes(upto[n - 1]), before = __shfl_up_sync(all_lanes, through, 1u);
        const double start = lane_id() ? in.log_ratio + before : in.log_ratio;
#pragma unroll
        for (int k = 0; k < n; ++k)
          raw[k] = A(start + upto[k]);
        in.log_ratio += __shfl_sync(all_lanes, through, 31);
      }
      if (!own.plain && p.power != 0) {
        const unsigned live = __ballot_sync(all_lanes, own.live);
        width = growth(A(in.position + __popc(live & ((2u << lane_id()) - 1))), A(p.power));
        in.position += __popc(live);
      }
    }
    if (own.trained) {
      A advantages[n], weights[n];
      read(p.advantages, row.advantage, own, advantages);
      read(p.weights, row.weight, own, weights);
      const A low = read(p.low, row.low, own) * width, high = read(p.high, row.high, own) * width,
              cap = read(p.cap, row.cap, own) * width;
      A share_low = 0, share_high = 0, divergence_given = 0;
      if constexpr (kind == Surrogate::gated) {
        share_low = read(p.outside_low, row.outside_low, own);
        share_high = read(p.outside_high, row.outside_high, own);
        divergence_given = read(p.given, row.given, own);
      }
      if (p.source == Source::given)
        read(p.log_ratio, row.log_ratio, own, raw);
      A loss = 0, ratio = 0, divergence = 0, finite = 0;
      unsigned sides = 0, capped = 0;
#pragma unroll
      for (int k = 0; k < n; ++k)
        finite += (own.plain ? pairs.difference[k] : pairs.log_prob[k]) * A(0);
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
        Outcome<A> out;
        if constexpr (own.plain && kind == Surrogate::clip) {
          const Clamped<A> c(raw[k], call.clamp_low, call.clamp_high);
          if constexpr (rowwise) {
            out = clip(c);
          } else {
            const SignedClip<A> of_token(advantages[k], clip);
            out = of_token(c);
            out.capped = out.above && of_token.caps;
            out.above &= !of_token.caps;
          }
          out.slope = choose(out.value == out.value, out.slope, out.value);
        } else {
          out = surrogate<kind>(Token<A>{raw[k], pairs.difference[k], pairs.log_prob[k], pairs.reference[k],
                                         advantages[k], low, high, cap, share_low, share_high,
                                         divergence_given},
                                p);
          spread_nan(out, own.plain || p.reference ? pairs.difference[k] : pairs.log_prob[k]);
        }
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
      if (rowwise && own.plain && kind == Surrogate::clip &&
          row.advantage < A(0)) { // `above` were stopped by the cap
        capped += sides >> 16;
        sides &= 0xffff;
      }
      tally.tokens += n;
      tally.below_above += sides;
      tally.capped_nonfinite += capped;
      tally.loss += double(loss);
      tally.ratio += double(ratio);
      tally.divergence += double(divergence);
    }
    A *slopes = static_cast<A *>(p.slopes);
    if constexpr (own.plain) {
      if (slopes)
        store_whole(slopes + own.t, Quad<A>{{slope[0], slope[1], slope[2], slope[3]}});
    } else if (slopes && own.here) {
      slopes[own.t] = slope[0];
    }
  }

  // Evaluates the tokens, before which the row has the sums `in`; leaves those after them there.
  __device__ Stats evaluate(Running &in) const {
    Tally tally;
    each([&](auto own) { take(own, in, tally); });
    return tally.total();
  }
};

// By one lane.
template <class A> __device__ void write_row(const PolicyLoss &p, int64_t r, const Stats &stats) {
  reinterpret_cast<Stats *>(p.stats)[r] = stats;
  static_cast<A *>(p.values)[r] = A(stats.sum[int(LossStat::loss)]);
}

template <Surrogate kind, class T, bool running, bool rowwise>
__device__ void tile(const PolicyLoss &p, const Call<accumulate_t<T>> &call, int64_t place, Stats *parts,
                     const Chain<Running> *chain) {
  using A = accumulate_t<T>;
  A *slopes = static_cast<A *>(p.slopes);
  const int64_t from = place * tile_size, to = min(from + tile_size, p.rows.size);
  const Taking taking(p, from);
  bool published = false;
  // The row that begins here and goes on comes first: the next tile waits for its sums, and they wait for
  // nothing.
  for (int turn = running ? 0 : 1; turn < 2; ++turn)
    each_piece<false>(
        p.rows, from, to,
        [&](int64_t r, int64_t first, int64_t last, bool starts, bool ends) {
          if (running && (starts && !ends) != (turn == 0))
            return;
          const Piece<kind, T, running, rowwise> piece(p, call, taking, r, from, int(first - from),
                                                       int(last - from));
          Running in;
          if constexpr (running) {
            if (!starts && !ends) {
              const Running own = piece.total();
              chain->publish(place, Chain<Running>::total, own);
              in = chain->arriving(place);
              chain->publish(place, Chain<Running>::carry, in.then(own));
            } else if (!starts) {
              in = chain->arriving(place);
            }
          }
          const Stats stats = piece.evaluate(in);
          if constexpr (running) {
            if (starts && !ends)
              chain->publish(place, Chain<Running>::carry, in);
            published |= !ends;
          }
          if (lane_id() != 0)
            return;
          if (starts && ends)
            write_row<A>(p, r, stats);
          else
            parts[part_of(place, !starts)] = stats;
        },
        [&](int64_t first, int64_t last) {
          if (slopes && turn == 1)
            fill_zero(slopes, first, last);
        });
  // Spans that overlap or are in no order may make the next tile wait for a row that did not come by here.
  if constexpr (running)
    if (!published)
      chain->publish(place, Chain<Running>::carry, Running{});
}

// Blocks per multiprocessor: as many as what a token needs leaves registers for.
template <Surrogate kind, class T, bool running, bool rowwise>
constexpr int resident = sizeof(T) == 8 ? (running || kind == Surrogate::gated || !rowwise ? 1 : 2)
                         : running      ? 2
                                        : (kind == Surrogate::gated || !rowwise ? 3 : 4);

template <Surrogate kind, class T, bool rowwise>
__global__ void __launch_bounds__(block_threads, resident<kind, T, false, rowwise>)
    policy_loss_tiles(PolicyLoss p, Call<accumulate_t<T>> call, int64_t tiles, Stats *parts) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place < tiles)
    tile<kind, T, false, rowwise>(p, call, place, parts, nullptr);
}

template <Surrogate kind, class T>
__global__ void __launch_bounds__(block_threads, resident<kind, T, true, true>)
    policy_loss_chained(PolicyLoss p, Call<accumulate_t<T>> call, int64_t tiles, Stats *parts,
                        Chain<Running> chain) {
  const int64_t place = chain.turn() * warps_per_block + threadIdx.x / 32;
  if (place < tiles)
    tile<kind, T, true, true>(p, call, place, parts, &chain);
}

// The sums of rows that are not inside one tile, a warp per row.
template <class A>
__global__ void __launch_bounds__(block_threads) merge_parts(PolicyLoss p, const Stats *parts) {
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (r >= p.rows.count)
    return;
  const auto [begin, end] = span_of(p.rows, r);
  if (begin < end && in_one_tile(begin, end))
    return;
  Stats own{};
  if (begin < end) {
    const int64_t first = begin / tile_size, last = (end - 1) / tile_size;
    for (int64_t k = first + lane_id(); k <= last; k += 32)
      own.merge(parts[part_of(k, k > first)]);
  }
  own = merge_lanes(own);
  if (lane_id() == 0)
    write_row<A>(p, r, own);
}

template <Surrogate kind, class T> void run(const PolicyLoss &p, Queue &queue) {
  const int64_t tiles = tiles_of(p.rows.size), blocks = ceil_div(tiles, warps_per_block);
  Stats *parts = queue.allocate_array<Stats>(2 * tiles);
  const Call<accumulate_t<T>> call(p, quads_aligned(static_cast<const T *>(p.log_probs)) &&
                                          quads_aligned(static_cast<const T *>(p.reference)));
  if (chained(p)) {
    const Chain<Running> chain("policy_loss", queue, tiles);
    launch("policy_loss", queue, policy_loss_chained<kind, T>, blocks, block_threads, p, call, tiles, parts,
           chain);
  } else {
    launch("policy_loss", queue,
           call.rowwise ? policy_loss_tiles<kind, T, true> : policy_loss_tiles<kind, T, false>, blocks,
           block_threads, p, call, tiles, parts);
  }
  launch("policy_loss", queue, merge_parts<accumulate_t<T>>, ceil_div(p.rows.count, warps_per_block),
         block_threads, p, parts);
}

template <class A> __global__ void __launch_bounds__(block_threads) scale_tiles(ScaleRows s, int64_t tiles) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  A *x = static_cast<A *>(s.x);
  const int64_t from = place * tile_size, to = min(from + tile_size, s.rows.size);
  each_piece<false>(
      s.rows, from, to,
      [&](int64_t r, int64_t first, int64_t last, bool, bool) {
        const A factor = static_cast<const A *>(s.factor)[s.per_row ? r : 0];
        if (factor == A(1))
          return;
        each_step<false>(first, last, [&](int64_t t) {
          if (t + quad <= first || t >= last)
            return;
          Quad<A> values = load_quad(x, t, s.rows.size, quads_aligned(x));
#pragma unroll
          for (int k = 0; k < quad; ++k)
            values.item[k] = values.item[k] == A(0) ? values.item[k] : values.item[k] * factor;
          store_quad(x, t, first, last, quads_aligned(x), values);
        });
      },
      [](int64_t, int64_t) {});
}

} // namespace

void policy_loss(const PolicyLoss &p, Queue &queue) {
  with_float(p.type, [&](auto t) {
    with_surrogate(p.surrogate,
                   [&](auto kind) { run<decltype(kind)::value, typename decltype(t)::type>(p, queue); });
  });
}

void scale_rows(const ScaleRows &s, Queue &queue) {
  const int64_t tiles = tiles_of(s.rows.size), blocks = ceil_div(tiles, warps_per_block);
  const auto kernel = [&](auto a) {
    launch("scale_rows", queue, scale_tiles<decltype(a)>, blocks, block_threads, s, tiles);
  };
  s.type == Type::f64 ? kernel(double{}) : kernel(float{});
}

} // namespace tokcredit::cuda
