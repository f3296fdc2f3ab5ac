#include "ops/segment.hpp"
#include "cpu/parallel.hpp"
#include "cpu/segment_rows.hpp"
#include "math/dispatch.hpp"
#include "math/moments.hpp"
#include "math/standard.hpp"
#include <vector>

namespace tokcredit::cpu {
namespace {

constexpr int64_t block = 65536;

// The value of element i; a count reads none.
template <Reduction kind, class T> double value(const T *x, int64_t i) {
  return kind == Reduction::count ? 0.0 : double(load(x[i]));
}

template <class T, Reduction kind> Moments<kind> span(const SegmentRows &s, int64_t begin, int64_t end) {
  const T *x = static_cast<const T *>(s.x) + begin;
  const bool *mask = s.rows.mask ? s.rows.mask + begin : nullptr;
  const int64_t n = end - begin;
  Moments<kind> m;
  if constexpr (kind == Reduction::logsumexp) {
    for (int64_t t = 0; t < n; ++t)
      if (!mask || mask[t])
        m.add(double(load(x[t])));
    return m;
  }
  using M = Moments<kind>;
  constexpr bool counts = kind == Reduction::count || kind == Reduction::mean || M::spreads;
  m.count = double(counts && mask ? TOKCREDIT_CHOOSE(count_true)(mask, n) : n);
  if constexpr (M::sums)
    m.sum = TOKCREDIT_CHOOSE(sum_true)(s.type, x, mask, n);
  if constexpr (M::spreads)
    TOKCREDIT_CHOOSE(squares_true)(s.type, x, mask, n, m.mean, m.square);
  if constexpr (M::has_minimum)
    m.minimum = TOKCREDIT_CHOOSE(extreme_true)(s.type, x, mask, n, true);
  if constexpr (M::has_maximum)
    m.maximum = TOKCREDIT_CHOOSE(extreme_true)(s.type, x, mask, n, false);
  return m;
}

template <class T, Reduction kind> void reduce_rows(const SegmentRows &s, int threads) {
  using A = accumulate_t<T>;
  constexpr int64_t chunk = kind == Reduction::logsumexp ? tokens_per_chunk : light;
  const int64_t grain = row_grain(s.rows.count, s.rows.size, chunk);
  parallel(s.rows.count, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      if (s.rows.end[r] - s.rows.begin[r] <= block)
        span<T, kind>(s, s.rows.begin[r], s.rows.end[r]).template write<A>(s.y, r, s.ddof);
  });
  for (int64_t r = 0; r < s.rows.count; ++r) {
    const int64_t begin = s.rows.begin[r], length = s.rows.end[r] - begin;
    if (length <= block)
      continue;
    std::vector<Moments<kind>> parts((length + block - 1) / block);
    parallel(int64_t(parts.size()), chunk / block, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        parts[size_t(i)] = span<T, kind>(s, begin + i * block, begin + std::min(length, (i + 1) * block));
    });
    Moments<kind> all;
    for (const auto &part : parts)
      all.merge(part);
    all.template write<A>(s.y, r, s.ddof);
  }
}

template <class T, Reduction kind> void reduce_ids(const SegmentIds &s) {
  using A = accumulate_t<T>;
  const T *x = static_cast<const T *>(s.x);
  std::vector<Moments<kind>> all(s.segments);
  for (int64_t i = 0; i < s.size; ++i)
    if ((!s.mask || s.mask[i]) && s.ids[i] >= 0 && s.ids[i] < s.segments)
      all[s.ids[i]].add(value<kind>(x, i));
  for (int64_t k = 0; k < s.segments; ++k)
    all[k].template write<A>(s.y, k, s.ddof);
}

// The body with element type and reduction as template arguments; a count may be of any type, as it reads
// none.
template <class Body> void dispatch(Type type, Reduction reduction, Body &&body) {
  with_reduction(reduction, [&](auto moments) { with_float(type, [&](auto t) { body(t, moments); }); });
}

} // namespace

void segment_rows(const SegmentRows &s, int threads) {
  dispatch(s.type, s.reduction, [&](auto t, auto moments) {
    reduce_rows<typename decltype(t)::type, decltype(moments)::reduction>(s, threads);
  });
}

void weighted_moments(const WeightedMoments &w) {
  const auto part = w.type == Type::f64 ? weighted_part<double> : weighted_part<float>;
  for (int64_t r = 0; r < w.rows.count; ++r)
    part(w, w.rows.begin[r], w.rows.end[r], 1).template write<double>(w.y, r, w.ddof);
}

void segment_ids(const SegmentIds &s) {
  dispatch(s.type, s.reduction, [&](auto t, auto moments) {
    reduce_ids<typename decltype(t)::type, decltype(moments)::reduction>(s);
  });
}

void standardize(const Standardize &s) {
  constexpr int64_t width = width_of(Reduction::moments);
  with_types(s, [&](auto from, auto to) {
    const auto *x = static_cast<const decltype(from) *>(s.x);
    auto *y = static_cast<decltype(to) *>(s.y);
    for (int64_t i = 0; i < s.size; ++i)
      y[i] = decltype(to)(standardized(double(x[i]), s.moments + s.group[i] * width, s.standard, s.epsilon));
  });
}

void row_affine(const RowAffine &a, int threads) {
  const auto rows = TOKCREDIT_CHOOSE(affine_rows);
  parallel(a.rows.count, row_grain(a.rows.count, a.rows.size, light), threads,
           [&](int64_t first, int64_t last) { rows(a, first, last); });
}

} // namespace tokcredit::cpu
