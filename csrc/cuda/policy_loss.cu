// One pass: each warp evaluates the pieces of rows in its tile. Where a token's ratio or window depends on
// the tokens before it, a row that came in from another tile waits for its sums there; sums over a row that
// meets several tiles are merged in order by a second, small kernel.
#include "cuda/chain.cuh"
#include "math/dispatch.hpp"
#include "math/surrogate.hpp"
#include "ops/policy_loss.hpp"

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

struct Sums {
  double loss = 0, ratio = 0, divergence = 0;

  __device__ void merge(const Sums &other) {
    loss += other.loss;
    ratio += other.ratio;
    divergence += other.divergence;
  }
};

// Five counts in one register: a lane sees at most 16 tokens of a piece.
struct Counts {
  static constexpr int bits = 6;
  unsigned packed = 0;

  __device__ void add(bool below, bool above, bool capped, bool nonfinite) {
    packed += 1u + (unsigned(below) << bits) + (unsigned(above) << 2 * bits) +
              (unsigned(capped) << 3 * bits) + (unsigned(nonfinite) << 4 * bits);
  }
  // Over all lanes.
  __device__ double total(int which) const {
    constexpr unsigned one = (1u << bits) - 1;
    return double(__reduce_add_sync(all_lanes, int(packed >> (bits * which) & one)));
  }
};
static_assert(tile_size / 32 < 1 << Counts::bits, "a count fits its bits");

// One operand seen from one row: a number per token, or one for all of them.
template <class A> struct Lane {
  const A *data; // null: `value` for every token
  A value;

  __device__ Lane(const Operand &o, int64_t row) : data(nullptr), value(A(o.value)) {
    const A *given = static_cast<const A *>(o.data);
    if (given && o.per == Per::token)
      data = given;
    else if (given)
      value = given[o.per == Per::row ? row : 0];
  }

  __device__ Quad<A> read(int64_t t, int64_t size) const {
    if (data)
      return load_quad(data, t, size, quads_aligned(data));
    return {value, value, value, value};
  }
};

// Four tokens of two policies.
template <class T> struct Pairs {
  Quad<T> log_probs, references;

  __device__ Pairs(const PolicyLoss &p, int64_t t, bool any) : log_probs{}, references{} {
    const T *one = static_cast<const T *>(p.log_probs), *other = static_cast<const T *>(p.reference);
    if (any)
      log_probs = load_quad(one, t, p.rows.size, quads_aligned(one));
    if (any && other)
      references = load_quad(other, t, p.rows.size, quads_aligned(other));
  }
};

// The differences of four tokens within the bound, and 0 where masked.
template <class T, class A>
__device__ Quad<A> differences(const PolicyLoss &p, const Quad<bool> &live, const Pairs<T> &pairs) {
  Quad<A> out{};
#pragma unroll
  for (int k = 0; k < quad; ++k)
    if (live.item[k])
      out.item[k] =
          bounded(A(load(pairs.log_probs.item[k]) - load(pairs.references.item[k])), A(-p.bound), A(p.bound));
  return out;
}

// The sums of a lane's four tokens; and, over the warp, those up to and including each lane.
template <class A> __device__ Running sums(const Quad<bool> &live, const Quad<A> &difference) {
  Running own;
#pragma unroll
  for (int k = 0; k < quad; ++k)
    own = own.then({double(difference.item[k]), live.item[k]});
  return own;
}
__device__ Running scan_lanes(Running upto) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Running before = from_lane(upto, lane_id() >= step ? lane_id() - step : lane_id());
    if (lane_id() >= step)
      upto = before.then(upto);
  }
  return upto;
}

// What the piece adds to the row's sums.
template <class T> __device__ Running total(const PolicyLoss &p, int64_t first, int64_t last) {
  using A = accumulate_t<T>;
  Running all;
  each_step<false>(first, last, [&](int64_t t) {
    const Quad<bool> live = live_quad(p.rows, t, first, last);
    Quad<A> difference{};
    if (p.source == Source::cumulative)
      difference = differences<T, A>(p, live, Pairs<T>(p, t, true));
    all = all.then(from_lane(scan_lanes(sums(live, difference)), 31));
  });
  return all;
}

// Evaluates tokens [first, last) of row r, whose sums before them are `in`; leaves those after them there.
template <Surrogate kind, class T, bool running>
__device__ Stats evaluate(const PolicyLoss &p, int64_t r, int64_t first, int64_t last, Running &in) {
  using A = accumulate_t<T>;
  A *slopes = static_cast<A *>(p.slopes);
  const Lane<A> advantages(p.advantages, r), weights(p.weights, r), low(p.low, r), high(p.high, r),
      cap(p.cap, r), outside_low(p.outside_low, r), outside_high(p.outside_high, r), other(p.given, r);
  const bool cumulative = running && p.source == Source::cumulative;
  const Lane<A> log_ratio(p.log_ratio, r);
  const int64_t size = p.rows.size;
  Sums sum;
  Counts counts;
  each_step<false>(first, last, [&](int64_t t) {
    const Quad<bool> live = live_quad(p.rows, t, first, last);
    const bool any = live.item[0] | live.item[1] | live.item[2] | live.item[3];
    const Pairs<T> pairs(p, t, any);
    Quad<A> step{}; // what each token adds to a cumulative log-ratio
    Running at;
    if constexpr (running) {
      if (cumulative)
        step = differences<T, A>(p, live, pairs);
      const Running upto = scan_lanes(sums(live, step));
      const Running before = from_lane(upto, lane_id() ? lane_id() - 1 : 0);
      at = lane_id() ? in.then(before) : in;
      in = in.then(from_lane(upto, 31));
    }
    Quad<A> slope{};
    if (any) {
      const Quad<A> advantage = advantages.read(t, size), weight = weights.read(t, size),
                    lows = low.read(t, size), highs = high.read(t, size), caps = cap.read(t, size);
      // Formed at once, so that fewer numbers are held in registers until a token's turn.
      Quad<A> raw{}, difference{};
      if (p.source == Source::given)
        raw = log_ratio.read(t, size);
#pragma unroll
      for (int k = 0; k < quad; ++k) {
        difference.item[k] =
            p.reference ? load(pairs.log_probs.item[k]) - load(pairs.references.item[k]) : raw.item[k];
        if (p.source == Source::difference)
          raw.item[k] = difference.item[k];
      }
      Quad<A> shares_low{}, shares_high{}, divergences{};
      if constexpr (kind == Surrogate::gated) {
        shares_low = outside_low.read(t, size);
        shares_high = outside_high.read(t, size);
        divergences = other.read(t, size);
      }
      Quad<bool> trains{};
      if (p.trains)
        trains = load_quad(p.trains, t, size, quads_aligned(p.trains));
      A loss = 0, ratio = 0, divergence = 0;
#pragma unroll
      for (int k = 0; k < quad; ++k) {
        if (!live.item[k])
          continue;
        A width = 1;
        if constexpr (running) {
          at = at.then({double(step.item[k]), 1});
          width = growth(A(at.position), A(p.power));
          if (cumulative)
            raw.item[k] = A(at.log_ratio);
        }
        if (p.trains && !trains.item[k])
          continue;
        const A log_prob = load(pairs.log_probs.item[k]);
        const Token<A> token{raw.item[k],
                             difference.item[k],
                             log_prob,
                             A(load(pairs.references.item[k])),
                             advantage.item[k],
                             lows.item[k] * width,
                             highs.item[k] * width,
                             caps.item[k] * width,
                             shares_low.item[k],
                             shares_high.item[k],
                             divergences.item[k]};
        Outcome<A> out = surrogate<kind>(token, p);
        spread_nan(out, p.reference ? difference.item[k] : log_prob);
        slope.item[k] = weight.item[k] * out.slope;
        loss += weight.item[k] * out.value;
        ratio += out.ratio;
        divergence += out.ratio - A(1) - out.log_ratio;
        counts.add(out.below, out.above, out.capped, log_prob - log_prob != A(0));
      }
      sum.merge({double(loss), double(ratio), double(divergence)});
    }
    if (slopes)
      store_quad(slopes, t, first, last, quads_aligned(slopes), slope);
  });
  sum = merge_lanes(sum);
  return {{sum.loss, counts.total(0), counts.total(1), counts.total(2), counts.total(3), sum.ratio,
           sum.divergence, counts.total(4)}};
}

// By one lane.
template <class A> __device__ void write_row(const PolicyLoss &p, int64_t r, const Stats &stats) {
  reinterpret_cast<Stats *>(p.stats)[r] = stats;
  static_cast<A *>(p.values)[r] = A(stats.sum[int(LossStat::loss)]);
}

template <Surrogate kind, class T, bool running>
__device__ void tile(const PolicyLoss &p, int64_t place, Stats *parts, const Chain<Running> *chain) {
  using A = accumulate_t<T>;
  A *slopes = static_cast<A *>(p.slopes);
  const int64_t from = place * tile_size, to = min(from + tile_size, p.rows.size);
  bool published = false;
  // The row that begins here and goes on comes first: the next tile waits for its sums, and they wait for
  // nothing.
  for (int turn = running ? 0 : 1; turn < 2; ++turn)
    each_piece<false>(
        p.rows, from, to,
        [&](int64_t r, int64_t first, int64_t last, bool starts, bool ends) {
          Running in;
          if constexpr (running) {
            if ((starts && !ends) != (turn == 0))
              return;
            if (!starts && !ends) {
              const Running own = total<T>(p, first, last);
              chain->publish(place, Chain<Running>::total, own);
              in = chain->arriving(place);
              chain->publish(place, Chain<Running>::carry, in.then(own));
            } else if (!starts) {
              in = chain->arriving(place);
            }
          }
          const Stats stats = evaluate<kind, T, running>(p, r, first, last, in);
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

// Blocks per multiprocessor: few enough that what a token needs fits the registers. Chained tiles also carry
// sums.
template <class T, bool running> constexpr int blocks_at_once = sizeof(T) == 8 || running ? 1 : 2;

template <Surrogate kind, class T>
__global__ void __launch_bounds__(block_threads, blocks_at_once<T, false>)
    policy_loss_tiles(PolicyLoss p, int64_t tiles, Stats *parts) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place < tiles)
    tile<kind, T, false>(p, place, parts, nullptr);
}

template <Surrogate kind, class T>
__global__ void __launch_bounds__(block_threads, blocks_at_once<T, true>)
    policy_loss_chained(PolicyLoss p, int64_t tiles, Stats *parts, Chain<Running> chain) {
  const int64_t place = chain.turn() * warps_per_block + threadIdx.x / 32;
  if (place < tiles)
    tile<kind, T, true>(p, place, parts, &chain);
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
  if (p.source == Source::cumulative || p.power != 0) {
    const Chain<Running> chain("policy_loss", queue, tiles);
    launch("policy_loss", queue, policy_loss_chained<kind, T>, blocks, block_threads, p, tiles, parts, chain);
  } else {
    launch("policy_loss", queue, policy_loss_tiles<kind, T>, blocks, block_threads, p, tiles, parts);
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
