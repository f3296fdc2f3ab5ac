// Rows: each warp walks a tile, 512 tokens at a time in registers, and each lane keeps what it has seen of
// the row until the row ends. A second, small kernel merges the parts of rows that meet several tiles, in
// order. Ids: values are sorted by id, which makes them rows.
#include "cuda/lane.cuh"
#include "cuda/powers.cuh"
#include "cuda/sort.cuh"
#include "math/dispatch.hpp"
#include "math/exponential.hpp"
#include "math/moments.hpp"
#include "math/standard.hpp"
#include "ops/segment.hpp"

namespace tokcredit::cuda {
namespace {

constexpr int held = int(tile_size); // tokens that a warp holds at once
// Tokens of a warp. It searches for the first of their rows, and merges its lanes, only once where a row is
// long.
constexpr int64_t segment_tile = 4 * held;

// NaN if either is.
__device__ float lesser(float a, float b) {
#ifdef __CUDA_ARCH__
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#else
  return b < a || b != b ? b : a;
#endif
}
__device__ float greater(float a, float b) {
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#else
  return b > a || b != b ? b : a;
#endif
}
__device__ double lesser(double a, double b) { return b < a || b != b ? b : a; }
__device__ double greater(double a, double b) { return b > a || b != b ? b : a; }

__device__ float greatest_finite(float) { return 3.402823466e38f; }
__device__ double greatest_finite(double) { return 1.7976931348623157e308; }

// All lanes get the result.
template <class V, class Fold> __device__ V fold_lanes(V x, Fold &&fold) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    x = fold(x, __shfl_xor_sync(all_lanes, x, step));
  return x;
}
__device__ double sum_lanes(double x) {
  return fold_lanes(x, [](double a, double b) { return a + b; });
}

// What a lane has seen of a row: at most 64 values.
template <class A, Reduction kind> struct Seen {
  using M = Moments<kind>;
  static constexpr bool scales = kind == Reduction::logsumexp;

  int count = 0;
  // About the first value, where a spread is wanted. Equal numbers then have none. Because it is one of a
  // few, the squares add up to at most about a hundred times those about any mean: to go over to that of all
  // lanes costs no digits that matter.
  double sum = 0, square = 0, scaled = 0;
  A origin = 0, least = A(INFINITY), most = scales ? -greatest_finite(A()) : -A(INFINITY);

  // exp(x), x at most 0. Rounding x / ln 2 costs digits only where the result is small beside 1.
  __device__ static A share(A x) { return power_of_two(x * A(log2_e)); }

  // Adds those of a lane's tokens whose bits are set; with `plain` all.
  template <bool plain, class T> __device__ void take(const Own<T> &x, unsigned live) {
    // A value, or one that changes nothing.
    const auto each = [&](A neutral, auto &&body) {
#pragma unroll
      for (int k = 0; k < own_tokens; ++k)
        body(k, plain || live >> k & 1 ? load(x[k]) : neutral);
    };
    if constexpr (M::has_minimum)
      each(A(INFINITY), [&](int, A v) { least = lesser(least, v); });
    if constexpr (M::has_maximum)
      each(-A(INFINITY), [&](int, A v) { most = greater(most, v); });
    if constexpr (M::sums)
      each(A(0), [&](int, A v) { sum += double(v); });
    if constexpr (M::spreads) {
      if (count == 0) {
#pragma unroll
        for (int k = own_tokens - 1; k >= 0; --k)
          origin = plain || live >> k & 1 ? load(x[k]) : origin;
      }
      each(origin, [&](int, A v) {
        const double d = double(v) - double(origin);
        sum += d;
        square += d * d;
      });
    }
    if constexpr (scales) {
      // A finite number, so that infinity less itself does not arise. NaN is left out, but its term is NaN.
      A top = most;
      each(-A(INFINITY), [&](int, A v) { top = v > top ? v : top; });
      top = min(top, greatest_finite(A()));
      A terms[4] = {};
      each(-A(INFINITY), [&](int k, A v) { terms[k % 4] += share(v - top); });
      scaled = scaled * double(share(most - top)) + double((terms[0] + terms[1]) + (terms[2] + terms[3]));
      most = top;
    }
    count += plain ? own_tokens : __popc(live);
  }

  // The moments of what all lanes have seen.
  __device__ M together() const {
    M all;
    const int total = __reduce_add_sync(all_lanes, count);
    all.count = total;
    if constexpr (M::sums)
      all.sum = sum_lanes(sum);
    if constexpr (M::spreads) {
      const unsigned lanes = __ballot_sync(all_lanes, count > 0);
      const double about = from_lane(double(origin), max(__ffs(int(lanes)) - 1, 0));
      const double shift = sum_lanes(count > 0 ? sum + count * (double(origin) - about) : 0);
      all.mean = about + (total > 0 ? shift / total : 0);
      // From the lane's origin to the mean. Infinite squares of finite numbers are an infinite spread.
      const double away = double(origin) - all.mean;
      const double moved = square < double(INFINITY) ? away * (2 * sum + count * away) : sum - sum;
      all.square = sum_lanes(count > 0 ? square + moved : 0);
    }
    if constexpr (M::has_minimum)
      all.minimum = double(fold_lanes(least, [](A a, A b) { return lesser(a, b); }));
    if constexpr (M::has_maximum)
      all.maximum = double(fold_lanes(most, [](A a, A b) { return greater(a, b); }));
    if constexpr (scales) {
      const A top = fold_lanes(most, [](A a, A b) { return max(a, b); });
      all.maximum = double(top);
      all.scaled = sum_lanes(scaled * double(share(most - top)));
    }
    return all;
  }
};

// Blocks per multiprocessor, so that enough loads are on their way; for a double there are fewer registers.
template <class T> constexpr int resident = sizeof(T) == 8 ? 2 : 3;

template <class T, Reduction kind>
__global__ void __launch_bounds__(block_threads, resident<T>)
    reduce_tiles(SegmentRows s, int64_t tiles, Moments<kind> *parts) {
  using A = accumulate_t<T>;
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const int64_t from = place * segment_tile;
  const int size = int(min(segment_tile, s.rows.size - from));
  // The row at hand, as far as it lies in the tile; at first none.
  int64_t r = count_at_most(s.rows.end, s.rows.count, from) - 1;
  int first = 0, last = 0;
  bool starts = false, ends = false;
  Seen<A, kind> seen;
  for (int at = 0; at < size; at += held) {
    const int64_t own_from = from + at + lane_id() * own_tokens;
    Own<T> x{};
    unsigned unmasked;
    if constexpr (kind == Reduction::count)
      unmasked = load_bits(s.rows.mask, own_from, s.rows.size);
    else
      unmasked = load_own(static_cast<const T *>(s.x), s.rows.mask, own_from, s.rows.size, x);
    const int stop = min(at + held, size);
    while (first < stop) {
      if (first < last) {
        const unsigned live = unmasked & bits_between(first - at, min(last, stop) - at);
        if (__all_sync(all_lanes, live == own_all))
          seen.template take<true>(x, live);
        else
          seen.template take<false>(x, live);
        if (last > stop)
          break;
        const Moments<kind> m = seen.together();
        if (lane_id() == 0) {
          if (starts && ends)
            m.template write<A>(s.y, r, s.ddof);
          else
            parts[part_of(place, !starts)] = m;
        }
        seen = {};
      }
      const auto [begin, end] = ++r < s.rows.count ? span_of(s.rows, r) : Span{s.rows.size, s.rows.size};
      starts = begin >= from;
      ends = end <= from + size;
      first = starts ? int(min(begin - from, int64_t(size))) : 0;
      last = ends ? int(max(end - from, int64_t(0))) : size;
    }
  }
}

// The merge of all lanes' parts in lane order, in lane 0; only what `kind` needs travels between lanes.
template <Reduction kind> __device__ Moments<kind> merge_moments(Moments<kind> m) {
  using M = Moments<kind>;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int lane = lane_id() + step < 32 ? lane_id() + step : lane_id();
    M other;
    other.count = from_lane(m.count, lane);
    if constexpr (M::sums)
      other.sum = from_lane(m.sum, lane);
    if constexpr (M::spreads) {
      other.mean = from_lane(m.mean, lane);
      other.square = from_lane(m.square, lane);
    }
    if constexpr (M::has_minimum)
      other.minimum = from_lane(m.minimum, lane);
    if constexpr (M::has_maximum || kind == Reduction::logsumexp)
      other.maximum = from_lane(m.maximum, lane);
    if constexpr (kind == Reduction::logsumexp)
      other.scaled = from_lane(m.scaled, lane);
    if (lane_id() % (2 * step) == 0)
      m.merge(other);
  }
  return m;
}

template <class A, Reduction kind>
__global__ void __launch_bounds__(block_threads, 1) merge_parts(SegmentRows s, const Moments<kind> *parts) {
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (r >= s.rows.count)
    return;
  const auto [begin, end] = span_of(s.rows, r);
  Moments<kind> own;
  if (begin < end) {
    const int64_t low = begin / segment_tile, count = (end - 1) / segment_tile + 1 - low;
    if (count == 1)
      return; // written by the tile
    // A run of tiles for each lane, so that the parts are merged in their order.
    const int64_t share = (count + 31) / 32;
    for (int64_t k = lane_id() * share; k < min(count, (lane_id() + 1) * share); ++k)
      own.merge(parts[part_of(low + k, k > 0)]);
  }
  own = merge_moments(own);
  if (lane_id() == 0)
    own.template write<A>(s.y, r, s.ddof);
}

// A warp for each row of few, which one warp of reduce_tiles would take one after the other.
template <class T, Reduction kind>
__global__ void __launch_bounds__(block_threads, resident<T>) reduce_each(SegmentRows s) {
  using A = accumulate_t<T>;
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (r >= s.rows.count)
    return;
  const auto [begin, end] = span_of(s.rows, r);
  Seen<A, kind> seen;
  for (int64_t at = begin / held * held; at < end; at += held) {
    Own<T> x{};
    const unsigned unmasked =
        load_own(static_cast<const T *>(s.x), s.rows.mask, at + lane_id() * own_tokens, s.rows.size, x);
    const int first = int(max(begin - at, int64_t(0))), last = int(min(end - at, int64_t(held)));
    seen.template take<false>(x, unmasked & bits_between(first, last));
  }
  const Moments<kind> m = seen.together();
  if (lane_id() == 0)
    m.template write<A>(s.y, r, s.ddof);
}

template <class T, Reduction kind> void reduce_rows(const SegmentRows &s, Queue &queue) {
  if constexpr (kind == Reduction::moments) { // of the groups of a batch
    if (s.rows.size <= segment_tile) {
      launch("segment", queue, reduce_each<T, kind>, ceil_div(s.rows.count, warps_per_block), block_threads,
             s);
      return;
    }
  }
  const int64_t tiles = ceil_div(s.rows.size, segment_tile);
  Moments<kind> *parts = queue.allocate_array<Moments<kind>>(2 * tiles);
  launch("segment", queue, reduce_tiles<T, kind>, ceil_div(tiles, warps_per_block), block_threads, s, tiles,
         parts);
  launch("segment", queue, merge_parts<accumulate_t<T>, kind>, ceil_div(s.rows.count, warps_per_block),
         block_threads, s, parts);
}

__global__ void make_keys(SegmentIds s, uint32_t *keys) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < s.size) {
    const bool inside = (!s.mask || s.mask[i]) && s.ids[i] >= 0 && s.ids[i] < s.segments;
    keys[i] = uint32_t(inside ? s.ids[i] : s.segments);
  }
}

// A warp for each row: rows are groups of rows of a batch, and few.
template <class T> __global__ void __launch_bounds__(block_threads) weigh_rows(WeightedMoments w) {
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (r >= w.rows.count)
    return;
  const auto [begin, end] = span_of(w.rows, r);
  const auto all = merge_moments(weighted_part<T>(w, begin + lane_id(), end, 32));
  if (lane_id() == 0)
    all.template write<double>(w.y, r, w.ddof);
}

template <class X, class Y> __global__ void standardize_each(Standardize s) {
  constexpr int64_t width = width_of(Reduction::moments);
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= s.size)
    return;
  const int64_t group = min(max(s.group[i], int64_t(0)), s.groups - 1);
  const double x = double(static_cast<const X *>(s.x)[i]);
  static_cast<Y *>(s.y)[i] = Y(standardized(x, s.moments + group * width, s.standard, s.epsilon));
}

template <class Y> __device__ Y affine(const RowAffine &a, double x, double factor, double shift) {
  const double value = factor * x + shift;
  return std::is_same_v<Y, bool> ? Y((a.low < value) & (value < a.high)) : Y(value);
}

template <class X, class Y>
__global__ void __launch_bounds__(block_threads) affine_tiles(RowAffine a, int64_t tiles) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const X *x = static_cast<const X *>(a.x);
  Y *y = static_cast<Y *>(a.y);
  each_piece<false>(
      a.rows, place * tile_size, min((place + 1) * tile_size, a.rows.size),
      [&](int64_t r, int64_t first, int64_t last, bool, bool) {
        const double factor = a.factor[a.per_row ? r : 0], shift = a.shift[a.per_row ? r : 0];
        each_step<false>(first, last, [&](int64_t t) {
          if (t + quad <= first || t >= last)
            return;
          const Quad<bool> live = live_quad(a.rows, t, first, last);
          const Quad<X> from = load_quad(x, t, a.rows.size, quads_aligned(x));
          Quad<Y> to;
#pragma unroll
          for (int k = 0; k < quad; ++k)
            to.item[k] = live.item[k] ? affine<Y>(a, double(from.item[k]), factor, shift) : Y(0);
          store_quad(y, t, first, last, quads_aligned(y), to);
        });
      },
      [&](int64_t first, int64_t last) { fill_zero(y, first, last); });
}

// The values by id, as bits.
template <class Bits> const void *sorted_values(const SegmentIds &s, const uint32_t **keys, Queue &queue) {
  const auto sorted = sort_pairs("segment", queue, *keys, static_cast<const Bits *>(s.x), s.size,
                                 bits_of(uint64_t(s.segments)));
  *keys = sorted.keys;
  return sorted.values;
}

} // namespace

void segment_rows(const SegmentRows &s, Queue &queue) {
  with_reduction(s.reduction, [&](auto moments) {
    with_float(s.type, [&](auto t) {
      reduce_rows<typename decltype(t)::type, decltype(moments)::reduction>(s, queue);
    });
  });
}

void weighted_moments(const WeightedMoments &w, Queue &queue) {
  launch("weighted_moments", queue, w.type == Type::f64 ? weigh_rows<double> : weigh_rows<float>,
         ceil_div(w.rows.count, warps_per_block), block_threads, w);
}

void segment_ids(const SegmentIds &s, Queue &queue) {
  check_fits("segment", "segments", s.segments);
  uint32_t *made = queue.allocate_array<uint32_t>(s.size);
  launch("segment", queue, make_keys, ceil_div(s.size, block_threads), block_threads, s, made);
  const uint32_t *keys = made;
  const void *values = s.type == Type::f64   ? sorted_values<uint64_t>(s, &keys, queue)
                       : s.type == Type::f32 ? sorted_values<uint32_t>(s, &keys, queue)
                                             : sorted_values<uint16_t>(s, &keys, queue);
  const int64_t *starts = starts_of("segment", queue, keys, s.size, s.segments);
  segment_rows({{starts, starts + 1, nullptr, s.segments, s.size}, s.type, values, s.reduction, s.ddof, s.y},
               queue);
}

void standardize(const Standardize &s, Queue &queue) {
  with_types(s, [&](auto x, auto y) {
    launch("standardize", queue, standardize_each<decltype(x), decltype(y)>, ceil_div(s.size, block_threads),
           block_threads, s);
  });
}

void row_affine(const RowAffine &a, Queue &queue) {
  const int64_t tiles = tiles_of(a.rows.size);
  with_results(a, [&](auto x, auto y) {
    launch("row_affine", queue, affine_tiles<decltype(x), decltype(y)>, ceil_div(tiles, warps_per_block),
           block_threads, a, tiles);
  });
}

} // namespace tokcredit::cuda
