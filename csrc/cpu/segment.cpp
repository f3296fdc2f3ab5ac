#include "ops/segment.hpp"
#include "cpu/parallel.hpp"
#include "cpu/simd.hpp"
#include "math/dispatch.hpp"
#include "math/moments.hpp"
#include <vector>

namespace tokcredit::cpu {
namespace {

constexpr int64_t block = 65536;

TOKCREDIT_CLONES int64_t count_true(const bool *mask, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n;) {
    // Few enough for a narrow sum, which is what makes the loop wide.
    uint8_t sum = 0;
    const int64_t last = std::min<int64_t>(n, i + 255);
    for (; i < last; ++i)
      sum = uint8_t(sum + mask[i]);
    total += sum;
  }
  return total;
}

// Every 128th element has a sum of its own, so that the loop is wide and no addition waits for the one
// before.
template <class T> TOKCREDIT_INLINE double sum_body(const T *x, const bool *mask, int64_t n) {
  constexpr int64_t width = 128;
  double sums[width] = {};
  for (int64_t i = 0; i < n; i += width) {
    const int64_t m = std::min(width, n - i);
    if (mask)
      for (int64_t k = 0; k < m; ++k) {
        const double v = load(x[i + k]);
        sums[k] += mask[i + k] ? v : 0.0;
      }
    else
      for (int64_t k = 0; k < m; ++k)
        sums[k] += double(load(x[i + k]));
  }
  return fold(sums, width);
}

// target_clones needs plain functions.
#define TOKCREDIT_SUM(T)                                                                                     \
  TOKCREDIT_CLONES double sum_true(const T *x, const bool *mask, int64_t n) { return sum_body(x, mask, n); }
TOKCREDIT_SUM(float)
TOKCREDIT_SUM(double)
TOKCREDIT_SUM(bf16)
TOKCREDIT_SUM(f16)
#undef TOKCREDIT_SUM

// The value of element i; a count reads none.
template <Reduction kind, class T> double value(const T *x, int64_t i) {
  return kind == Reduction::count ? 0.0 : double(load(x[i]));
}

template <class T, Reduction kind>
Moments<kind> span(const T *x, const bool *mask, int64_t begin, int64_t end) {
  Moments<kind> m;
  if constexpr (kind == Reduction::sum || kind == Reduction::mean) {
    mask = mask ? mask + begin : nullptr;
    m.count = double(mask ? count_true(mask, end - begin) : end - begin);
    m.sum = sum_true(x + begin, mask, end - begin);
    return m;
  }
  if constexpr (kind == Reduction::count) {
    m.count = double(mask ? count_true(mask + begin, end - begin) : end - begin);
    return m;
  }
  for (int64_t t = begin; t < end; ++t)
    if (!mask || mask[t])
      m.add(value<kind>(x, t));
  return m;
}

template <class T, Reduction kind> void reduce_rows(const SegmentRows &s, int threads) {
  using A = accumulate_t<T>;
  const T *x = static_cast<const T *>(s.x);
  A *y = static_cast<A *>(s.y);
  parallel(s.rows.count, row_grain(s.rows.count, s.rows.size), threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      if (s.rows.end[r] - s.rows.begin[r] <= block)
        y[r] = A(span<T, kind>(x, s.rows.mask, s.rows.begin[r], s.rows.end[r]).result(s.ddof));
  });
  for (int64_t r = 0; r < s.rows.count; ++r) {
    const int64_t begin = s.rows.begin[r], length = s.rows.end[r] - begin;
    if (length <= block)
      continue;
    std::vector<Moments<kind>> parts((length + block - 1) / block);
    parallel(length, block, threads, [&](int64_t first, int64_t last) {
      parts[first / block] = span<T, kind>(x, s.rows.mask, begin + first, begin + last);
    });
    Moments<kind> all;
    for (const auto &part : parts)
      all.merge(part);
    y[r] = A(all.result(s.ddof));
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
    static_cast<A *>(s.y)[k] = A(all[k].result(s.ddof));
}

// The body with element type and reduction as template arguments; a count may be of any type, as it reads
// none.
template <class Body> void dispatch(Type type, int32_t reduction, Body &&body) {
  with_reduction(reduction, [&](auto moments) { with_float(type, [&](auto t) { body(t, moments); }); });
}

} // namespace

void segment_rows(const SegmentRows &s, int threads) {
  dispatch(s.type, s.reduction, [&](auto t, auto moments) {
    reduce_rows<typename decltype(t)::type, decltype(moments)::reduction>(s, threads);
  });
}

void segment_ids(const SegmentIds &s) {
  dispatch(s.type, s.reduction, [&](auto t, auto moments) {
    reduce_ids<typename decltype(t)::type, decltype(moments)::reduction>(s);
  });
}

} // namespace tokcredit::cpu
