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

// Four counts in one register: a lane sees at most 16 tokens of a piece.
struct Counts {
  unsigned packed = 0;

  __device__ void add(bool below, bool above, bool capped) {
    packed += 1u + (unsigned(below) << 8) + (unsigned(above) << 16) + (unsigned(capped) << 24);
  }
  // Over all lanes.
  __device__ double total(int which) const {
    return double(__reduce_add_sync(all_lanes, int(packed >> (8 * which) & 255u)));
  }
};
static_assert(tile_size / 32 < 256, "a count fits its byte");

// One operand seen from one row: a number per token, or one for all of them.
template <class A> struct Lane {
  const A *data; // null: `value` for every token
  A value;

  __device__ Lane(const Operand &o, int64_t row, A absent) : data(nullptr), value(absent) {
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

// The differences of four tokens, each within the bound, and 0 where masked.
template <class T, class A>
__device__ Quad<A> differences(const PolicyLoss &p, int64_t t, const Quad<bool> &live,
                               const Quad<T> &log_probs) {
  const T *reference = static_cast<const T *>(p.reference);
  const Quad<T> others = load_quad(reference, t, p.rows.size, quads_aligned(reference));
  Quad<A> out{};
#pragma unroll
  for (int k = 0; k < quad; ++k)
    if (live.item[k]) {
      out.item[k] = load(log_probs.item[k]) - load(others.item[k]);
      if (p.cumulative)
        out.item[k] = bounded(out.item[k], A(-p.bound), A(p.bound));
    }
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
  const T *log_probs = static_cast<const T *>(p.log_probs);
  Running all;
  each_step<false>(first, last, [&](int64_t t) {
    const Quad<bool> live = live_quad(p.rows, t, first, last);
    Quad<A> difference{};
    if (p.cumulative)
      difference =
          differences<T, A>(p, t, live, load_quad(log_probs, t, p.rows.size, quads_aligned(log_probs)));
    all = all.then(from_lane(scan_lanes(sums(live, difference)), 31));
  });
  return all;
}

// Evaluates tokens [first, last) of row r, whose sums before them are `in`; leaves those after them there.
template <Surrogate kind, class T, bool running>
__device__ Stats evaluate(const PolicyLoss &p, int64_t r, int64_t first, int64_t last, Running &in) {
  using A = accumulate_t<T>;
  const A infinity = A(INFINITY);
  const T *log_probs = static_cast<const T *>(p.log_probs);
  A *gradient = static_cast<A *>(p.gradient);
  const Lane<A> log_ratio(p.log_ratio, r, 0), advantages(p.advantages, r, 1), weights(p.weights, r, 1),
      low(p.low, r, -infinity), high(p.high, r, infinity), cap(p.cap, r, infinity);
  const bool subtract = p.reference && !p.log_ratio.data;
  const int64_t size = p.rows.size;
  Sums sum;
  Counts counts;
  each_step<false>(first, last, [&](int64_t t) {
    const Quad<bool> live = live_quad(p.rows, t, first, last);
    const bool any = live.item[0] | live.item[1] | live.item[2] | live.item[3];
    const Quad<T> log_prob = any ? load_quad(log_probs, t, size, quads_aligned(log_probs)) : Quad<T>{};
    Quad<A> raw{};
    if (any)
      raw = subtract ? differences<T, A>(p, t, live, log_prob) : log_ratio.read(t, size);
    Running at;
    if constexpr (running) {
      const Running own = sums(live, subtract ? raw : Quad<A>{}), upto = scan_lanes(own);
      const Running before = from_lane(upto, lane_id() ? lane_id() - 1 : 0);
      at = lane_id() ? in.then(before) : in;
      in = in.then(from_lane(upto, 31));
    }
    Quad<A> slope{};
    if (any) {
      const Quad<A> advantage = advantages.read(t, size), weight = weights.read(t, size),
                    lows = low.read(t, size), highs = high.read(t, size), caps = cap.read(t, size);
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
          at = at.then({double(raw.item[k]), 1});
          width = growth(A(at.position), A(p.power));
          if (p.cumulative)
            raw.item[k] = A(at.log_ratio);
        }
        if (p.trains && !trains.item[k])
          continue;
        const A x = bounded(raw.item[k], A(p.clamp_low), A(p.clamp_high));
        const Paid<A> paid =
            surrogate<kind, A>({x, A(load(log_prob.item[k])), advantage.item[k], lows.item[k] * width,
                                highs.item[k] * width, caps.item[k] * width, x == raw.item[k]});
        slope.item[k] = weight.item[k] * paid.gradient;
        loss += weight.item[k] * paid.value;
        ratio += paid.ratio;
        divergence += paid.ratio - A(1) - x;
        counts.add(paid.below, paid.above, paid.capped);
      }
      sum.merge({double(loss), double(ratio), double(divergence)});
    }
    if (gradient)
      store_quad(gradient, t, first, last, quads_aligned(gradient), slope);
  });
  sum = merge_lanes(sum);
  return {{sum.loss, counts.total(0), counts.total(1), counts.total(2), counts.total(3), sum.ratio,
           sum.divergence}};
}

template <Surrogate kind, class T, bool running>
__device__ void tile(const PolicyLoss &p, int64_t place, Stats *parts, const Chain<Running> *chain) {
  using A = accumulate_t<T>;
  A *gradient = static_cast<A *>(p.gradient);
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
          if (lane_id() == 0) {
            Stats *out = reinterpret_cast<Stats *>(p.stats) + r;
            *(starts && ends ? out : parts + part_of(place, !starts)) = stats;
          }
        },
        [&](int64_t first, int64_t last) {
          if (gradient && turn == 1)
            fill_zero(gradient, first, last);
        });
  // Spans that overlap or are in no order may make the next tile wait for a row that did not come by here.
  if constexpr (running)
    if (!published)
      chain->publish(place, Chain<Running>::carry, Running{});
}

// Enough registers for all that a token needs, but for two to eight words of some kinds, and few enough for
// 24 warps per multiprocessor (double: 8).
template <class T> constexpr int blocks_at_once = sizeof(T) == 8 ? 1 : 3;

template <Surrogate kind, class T>
__global__ void __launch_bounds__(block_threads, blocks_at_once<T>)
    policy_loss_tiles(PolicyLoss p, int64_t tiles, Stats *parts) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place < tiles)
    tile<kind, T, false>(p, place, parts, nullptr);
}

template <Surrogate kind, class T>
__global__ void __launch_bounds__(block_threads, blocks_at_once<T> == 3 ? 2 : 1)
    policy_loss_chained(PolicyLoss p, int64_t tiles, Stats *parts, Chain<Running> chain) {
  const int64_t place = chain.turn() * warps_per_block + threadIdx.x / 32;
  if (place < tiles)
    tile<kind, T, true>(p, place, parts, &chain);
}

// The sums of rows that are not inside one tile, a warp per row.
__global__ void __launch_bounds__(block_threads) merge_parts(Rows rows, const Stats *parts, double *stats) {
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (r >= rows.count)
    return;
  const auto [begin, end] = span_of(rows, r);
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
    reinterpret_cast<Stats *>(stats)[r] = own;
}

template <Surrogate kind, class T> void run(const PolicyLoss &p, Queue &queue) {
  const int64_t tiles = tiles_of(p.rows.size), blocks = ceil_div(tiles, warps_per_block);
  Stats *parts = queue.allocate_array<Stats>(2 * tiles);
  if (p.cumulative || p.power != 0) {
    const Chain<Running> chain("policy_loss", queue, tiles);
    launch("policy_loss", queue, policy_loss_chained<kind, T>, blocks, block_threads, p, tiles, parts, chain);
  } else {
    launch("policy_loss", queue, policy_loss_tiles<kind, T>, blocks, block_threads, p, tiles, parts);
  }
  launch("policy_loss", queue, merge_parts, ceil_div(p.rows.count, warps_per_block), block_threads, p.rows,
         parts, p.stats);
}

} // namespace

void policy_loss(const PolicyLoss &p, Queue &queue) {
  with_float(p.type, [&](auto t) {
    using T = typename decltype(t)::type;
    switch (Surrogate(p.surrogate)) {
    case Surrogate::clip:
      return run<Surrogate::clip, T>(p, queue);
    case Surrogate::weighted:
      return run<Surrogate::weighted, T>(p, queue);
    case Surrogate::soft:
      return run<Surrogate::soft, T>(p, queue);
    case Surrogate::k1:
      return run<Surrogate::k1, T>(p, queue);
    case Surrogate::k2:
      return run<Surrogate::k2, T>(p, queue);
    default:
      return run<Surrogate::k3, T>(p, queue);
    }
  });
}

} // namespace tokcredit::cuda
