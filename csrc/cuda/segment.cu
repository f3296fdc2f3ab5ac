// Rows: each warp holds a tile in registers and reduces the pieces of rows in it, and a second, small kernel
// merges the parts of rows that meet several tiles, in order. Ids: values are sorted by id, which makes them
// rows.
#include "cuda/lane.cuh"
#include "cuda/sort.cuh"
#include "math/dispatch.hpp"
#include "math/exponential.hpp"
#include "math/moments.hpp"
#include "math/standard.hpp"
#include "ops/segment.hpp"

namespace tokcredit::cuda {
namespace {

// Only what `kind` needs travels between lanes.
template <Reduction kind> __device__ Moments<kind> moments_from(const Moments<kind> &m, int lane) {
  using M = Moments<kind>;
  M out;
  out.count = from_lane(m.count, lane);
  if constexpr (M::sums)
    out.sum = from_lane(m.sum, lane);
  if constexpr (M::spreads) {
    out.mean = from_lane(m.mean, lane);
    out.square = from_lane(m.square, lane);
  }
  if constexpr (M::has_minimum)
    out.minimum = from_lane(m.minimum, lane);
  if constexpr (M::has_maximum || kind == Reduction::logsumexp)
    out.maximum = from_lane(m.maximum, lane);
  if constexpr (kind == Reduction::logsumexp)
    out.scaled = from_lane(m.scaled, lane);
  return out;
}

template <Reduction kind> __device__ Moments<kind> merge_moments(Moments<kind> m) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Moments<kind> other = moments_from(m, lane_id() + step < 32 ? lane_id() + step : lane_id());
    if (lane_id() % (2 * step) == 0)
      m.merge(other);
  }
  return m;
}

// The moments of those of a lane's tokens whose bits are set; with `plain` of all. One division, and one
// maximum, for sixteen.
template <Reduction kind, bool plain, class T>
__device__ Moments<kind> moments_of(const Own<T> &x, unsigned live) {
  using A = accumulate_t<T>;
  using M = Moments<kind>;
  M own;
  own.count = plain ? own_tokens : __popc(live);
  const auto each = [&](auto &&body) {
#pragma unroll
    for (int k = 0; k < own_tokens; ++k)
      if (plain || live >> k & 1)
        body(load(x.item[k]));
  };
  if constexpr (M::sums)
    each([&](A v) { own.sum += double(v); });
  if constexpr (M::spreads) {
    // About one of them, so that equal numbers have their mean and no spread.
    double origin = 0, sum = 0;
    each([&](A v) { origin = double(v); });
    each([&](A v) { sum += double(v) - origin; });
    own.mean = origin + (own.count > 0 ? sum / own.count : 0);
    each([&](A v) {
      const double d = double(v) - own.mean;
      own.square += d * d;
    });
  }
  if constexpr (M::has_minimum) {
    A least = A(INFINITY);
    each([&](A v) { least = v < least || v != v ? v : least; });
    own.minimum = double(least);
  }
  if constexpr (M::has_maximum || kind == Reduction::logsumexp) {
    A most = -A(INFINITY);
    each([&](A v) { most = v > most || v != v ? v : most; });
    own.maximum = double(most);
    if constexpr (kind == Reduction::logsumexp)
      if (most != -A(INFINITY))
        each([&](A v) { own.scaled += v == most ? 1.0 : double(exponential(v - most)); });
  }
  return own;
}

template <class T, Reduction kind>
__global__ void __launch_bounds__(block_threads, 2)
    reduce_tiles(SegmentRows s, int64_t tiles, Moments<kind> *parts) {
  using A = accumulate_t<T>;
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const int64_t from = place * tile_size, to = min(from + tile_size, s.rows.size);
  const int64_t own_from = from + lane_id() * own_tokens;
  Own<T> x{};
  if constexpr (kind != Reduction::count)
    x = load_own(static_cast<const T *>(s.x), own_from, s.rows.size);
  const unsigned unmasked = s.rows.mask ? load_bits(s.rows.mask, own_from, s.rows.size) : own_all;
  each_piece<false>(
      s.rows, from, to,
      [&](int64_t r, int64_t first, int64_t last, bool starts, bool ends) {
        const unsigned live = unmasked & bits_between(int(first - from), int(last - from));
        const bool plain = __all_sync(all_lanes, live == own_all);
        const Moments<kind> own = plain ? moments_of<kind, true>(x, live) : moments_of<kind, false>(x, live);
        const Moments<kind> m = merge_moments(own);
        if (lane_id() != 0)
          return;
        if (starts && ends)
          m.template write<A>(s.y, r, s.ddof);
        else
          parts[part_of(place, !starts)] = m;
      },
      [](int64_t, int64_t) {});
}

template <class A, Reduction kind>
__global__ void __launch_bounds__(block_threads, 1) merge_parts(SegmentRows s, const Moments<kind> *parts) {
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (r >= s.rows.count)
    return;
  const auto [begin, end] = span_of(s.rows, r);
  if (begin < end && in_one_tile(begin, end))
    return;
  Moments<kind> own;
  if (begin < end) {
    // A run of tiles for each lane, so that the parts are merged in their order.
    const int64_t low = begin / tile_size, count = (end - 1) / tile_size + 1 - low, share = (count + 31) / 32;
    for (int64_t k = lane_id() * share; k < min(count, (lane_id() + 1) * share); ++k)
      own.merge(parts[part_of(low + k, k > 0)]);
  }
  own = merge_moments(own);
  if (lane_id() == 0)
    own.template write<A>(s.y, r, s.ddof);
}

template <class T, Reduction kind> void reduce_rows(const SegmentRows &s, Queue &queue) {
  const int64_t tiles = tiles_of(s.rows.size);
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

} // namespace tokcredit::cuda
