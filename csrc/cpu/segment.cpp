#include "ops/segment.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/parallel.hpp"
#include <cmath>
#include <limits>
#include <vector>

namespace tokcredit::cpu {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t block = 65536;

// What any of the reductions needs of the values seen so far. Moments are kept about the first value's
// running mean (Welford), so that a spread far smaller than the mean keeps its digits.
struct Moments {
  double count = 0, sum = 0, mean = 0, square = 0, minimum = infinity, maximum = -infinity, scaled = 0;

  template <int kind> void add(double x) {
    count += 1;
    if constexpr (kind == int(Reduction::sum) || kind == int(Reduction::mean))
      sum += x;
    if constexpr (kind == int(Reduction::var)) {
      const double delta = x - mean;
      mean += delta / count;
      square += delta * (x - mean);
    }
    if constexpr (kind == int(Reduction::minimum))
      minimum = x < minimum || x != x ? x : minimum;
    if constexpr (kind == int(Reduction::maximum))
      maximum = x > maximum || x != x ? x : maximum;
    if constexpr (kind == int(Reduction::logsumexp)) {
      if (x > maximum || x != x) {
        scaled = scaled * std::exp(maximum - x) + 1;
        maximum = x;
      } else if (x > -infinity) {
        scaled += x == maximum ? 1 : std::exp(x - maximum);
      }
    }
  }

  void merge(const Moments &o) {
    if (o.count == 0)
      return;
    const double total = count + o.count, delta = o.mean - mean;
    square += o.square + delta * delta * count * o.count / total;
    mean += delta * o.count / total;
    if (o.maximum > maximum) {
      scaled = o.scaled + (maximum > -infinity ? scaled * std::exp(maximum - o.maximum) : 0);
    } else if (o.maximum > -infinity) {
      scaled += o.scaled * (o.maximum == maximum ? 1 : std::exp(o.maximum - maximum));
    }
    count = total;
    sum += o.sum;
    minimum = o.minimum < minimum || o.minimum != o.minimum ? o.minimum : minimum;
    maximum = o.maximum > maximum || o.maximum != o.maximum ? o.maximum : maximum;
  }

  double result(Reduction kind, double ddof) const {
    switch (kind) {
    case Reduction::sum:
      return sum;
    case Reduction::mean:
      return count > 0 ? sum / count : 0;
    case Reduction::var:
      return count > ddof && count > 0 ? square / (count - ddof) : 0;
    case Reduction::minimum:
      return minimum;
    case Reduction::maximum:
      return maximum;
    case Reduction::count:
      return count;
    default:
      return scaled > 0 || scaled != scaled ? maximum + std::log(scaled) : -infinity;
    }
  }
};

template <class T, int kind> Moments span(const T *x, const bool *mask, int64_t begin, int64_t end) {
  Moments m;
  for (int64_t t = begin; t < end; ++t)
    if (!mask || mask[t])
      m.add<kind>(kind == int(Reduction::count) ? 0.0 : double(load(x[t])));
  return m;
}

template <class T, int kind> void reduce_rows(const SegmentRows &s, int threads) {
  using A = accumulate_t<T>;
  const T *x = static_cast<const T *>(s.x);
  A *y = static_cast<A *>(s.y);
  const auto finish = [&](const Moments &m) { return A(m.result(Reduction(kind), s.ddof)); };
  parallel(s.rows.count, row_grain(s.rows.count, s.rows.size), threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      if (s.rows.end[r] - s.rows.begin[r] <= block)
        y[r] = finish(span<T, kind>(x, s.rows.mask, s.rows.begin[r], s.rows.end[r]));
  });
  for (int64_t r = 0; r < s.rows.count; ++r) {
    const int64_t begin = s.rows.begin[r], length = s.rows.end[r] - begin;
    if (length <= block)
      continue;
    std::vector<Moments> parts((length + block - 1) / block);
    parallel(length, block, threads, [&](int64_t first, int64_t last) {
      parts[first / block] = span<T, kind>(x, s.rows.mask, begin + first, begin + last);
    });
    Moments all;
    for (const Moments &part : parts)
      all.merge(part);
    y[r] = finish(all);
  }
}

template <class T, int kind> void reduce_ids(const SegmentIds &s) {
  using A = accumulate_t<T>;
  const T *x = static_cast<const T *>(s.x);
  std::vector<Moments> all(s.segments);
  for (int64_t i = 0; i < s.size; ++i)
    if ((!s.mask || s.mask[i]) && s.ids[i] >= 0 && s.ids[i] < s.segments)
      all[s.ids[i]].template add<kind>(kind == int(Reduction::count) ? 0.0 : double(load(x[i])));
  for (int64_t k = 0; k < s.segments; ++k)
    static_cast<A *>(s.y)[k] = A(all[k].result(Reduction(kind), s.ddof));
}

template <class Body> void with_reduction(int32_t reduction, Body &&body) {
  switch (Reduction(reduction)) {
  case Reduction::sum:
    return body(std::integral_constant<int, int(Reduction::sum)>{});
  case Reduction::mean:
    return body(std::integral_constant<int, int(Reduction::mean)>{});
  case Reduction::var:
    return body(std::integral_constant<int, int(Reduction::var)>{});
  case Reduction::minimum:
    return body(std::integral_constant<int, int(Reduction::minimum)>{});
  case Reduction::maximum:
    return body(std::integral_constant<int, int(Reduction::maximum)>{});
  case Reduction::count:
    return body(std::integral_constant<int, int(Reduction::count)>{});
  default:
    return body(std::integral_constant<int, int(Reduction::logsumexp)>{});
  }
}

} // namespace

void segment_rows(const SegmentRows &s, int threads) {
  with_reduction(s.reduction, [&](auto kind) {
    with_float(s.type,
               [&](auto t) { reduce_rows<typename decltype(t)::type, decltype(kind)::value>(s, threads); });
  });
}

void segment_ids(const SegmentIds &s) {
  with_reduction(s.reduction, [&](auto kind) {
    with_float(s.type, [&](auto t) { reduce_ids<typename decltype(t)::type, decltype(kind)::value>(s); });
  });
}

} // namespace tokcredit::cpu
