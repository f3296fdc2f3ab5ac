// What a reduction needs of the values seen so far: how one value joins, and how two parts merge.
#pragma once
#include "math/number.hpp"
#include "ops/segment.hpp"
#include <cmath>
#include <type_traits>

namespace tokcredit {

// Moments are kept about the running mean (Welford), so that a spread far smaller than the mean keeps its
// digits. Only the members that `kind` needs are kept up to date.
template <Reduction kind> struct Moments {
  static constexpr Reduction reduction = kind;
  static constexpr bool sums = kind == Reduction::sum || kind == Reduction::mean;
  static constexpr bool spreads = kind == Reduction::var || kind == Reduction::moments;
  static constexpr bool has_minimum = kind == Reduction::minimum || kind == Reduction::moments;
  static constexpr bool has_maximum = kind == Reduction::maximum || kind == Reduction::moments;

  double count = 0, sum = 0, mean = 0, square = 0;
  double minimum = double(INFINITY), maximum = -double(INFINITY), scaled = 0;

  TOKCREDIT_FN static double least(double a, double b) { return b < a || b != b ? b : a; }
  TOKCREDIT_FN static double greatest(double a, double b) { return b > a || b != b ? b : a; }

  TOKCREDIT_FN void add(double x) {
    count += 1;
    if constexpr (sums)
      sum += x;
    if constexpr (spreads) {
      const double delta = x - mean;
      mean += delta / count;
      square += delta * (x - mean);
    }
    if constexpr (has_minimum)
      minimum = least(minimum, x);
    if constexpr (has_maximum)
      maximum = greatest(maximum, x);
    if constexpr (kind == Reduction::logsumexp) {
      if (x > maximum || x != x) {
        scaled = scaled * std::exp(maximum - x) + 1;
        maximum = x;
      } else if (x > -double(INFINITY)) {
        scaled += x == maximum ? 1 : std::exp(x - maximum);
      }
    }
  }

  // A value that counts `weight` times, above 0; of moments only.
  TOKCREDIT_FN void add(double x, double weight) {
    static_assert(kind == Reduction::moments, "other reductions have no weights");
    const double delta = x - mean;
    mean = count == 0 ? x : mean + delta * (weight / (count + weight)); // equal numbers have it exactly
    count += weight;
    square += weight * delta * (x - mean);
    minimum = least(minimum, x);
    maximum = greatest(maximum, x);
  }

  TOKCREDIT_FN void merge(const Moments &o) {
    if (o.count == 0)
      return;
    if (count == 0) {
      *this = o; // as it is: the mean below would be rounded
      return;
    }
    const double total = count + o.count;
    if constexpr (sums)
      sum += o.sum;
    if constexpr (spreads) {
      const double delta = o.mean - mean;
      square += o.square + delta * delta * count * o.count / total;
      mean += delta * (o.count / total);
    }
    if constexpr (has_minimum)
      minimum = least(minimum, o.minimum);
    if constexpr (kind == Reduction::logsumexp) {
      if (o.maximum > maximum)
        scaled = o.scaled + (maximum > -double(INFINITY) ? scaled * std::exp(maximum - o.maximum) : 0);
      else if (o.maximum > -double(INFINITY))
        scaled += o.scaled * (o.maximum == maximum ? 1 : std::exp(o.maximum - maximum));
      else if (o.maximum != o.maximum)
        scaled = o.scaled;
    }
    if constexpr (has_maximum || kind == Reduction::logsumexp)
      maximum = greatest(maximum, o.maximum);
    count = total;
  }

  TOKCREDIT_FN double variance(double ddof) const {
    return count > ddof && count > 0 ? square / (count - ddof) : 0;
  }

  TOKCREDIT_FN double result(double ddof) const {
    if constexpr (kind == Reduction::sum)
      return sum;
    else if constexpr (kind == Reduction::mean)
      return count > 0 ? sum / count : 0;
    else if constexpr (kind == Reduction::var)
      return variance(ddof);
    else if constexpr (kind == Reduction::minimum)
      return minimum;
    else if constexpr (kind == Reduction::maximum)
      return maximum;
    else if constexpr (kind == Reduction::count)
      return count;
    else
      return scaled > 0 || scaled != scaled ? maximum + std::log(scaled) : -double(INFINITY);
  }

  // The result of a segment, where the contract wants it; A is the accumulation type of what is no count.
  template <class A> TOKCREDIT_FN void write(void *y, int64_t segment, double ddof) const {
    if constexpr (kind == Reduction::moments) {
      const double all[] = {count, mean, variance(ddof), minimum, maximum};
      static_assert(sizeof all == width_of(kind) * sizeof(double), "one number for each");
      for (int k = 0; k < int(width_of(kind)); ++k)
        static_cast<double *>(y)[segment * width_of(kind) + k] = all[k];
    } else {
      using Y = std::conditional_t<kind == Reduction::count, int64_t, A>;
      static_cast<Y *>(y)[segment] = Y(result(ddof));
    }
  }
};

// The moments of those tokens of a row that `step` apart begin with `first`.
template <class T>
TOKCREDIT_FN Moments<Reduction::moments> weighted_part(const WeightedMoments &w, int64_t first, int64_t last,
                                                       int64_t step) {
  Moments<Reduction::moments> m;
  for (int64_t t = first; t < last; t += step)
    if ((!w.rows.mask || w.rows.mask[t]) && w.weights[t] > 0)
      m.add(double(static_cast<const T *>(w.x)[t]), w.weights[t]);
  return m;
}

// The body with the reduction as a template argument.
template <class Body> void with_reduction(Reduction reduction, Body &&body) {
  switch (reduction) {
#define TOKCREDIT_REDUCTION(kind)                                                                            \
  case Reduction::kind:                                                                                      \
    return body(Moments<Reduction::kind>{});
    TOKCREDIT_REDUCTION(sum)
    TOKCREDIT_REDUCTION(mean)
    TOKCREDIT_REDUCTION(var)
    TOKCREDIT_REDUCTION(minimum)
    TOKCREDIT_REDUCTION(maximum)
    TOKCREDIT_REDUCTION(count)
    TOKCREDIT_REDUCTION(logsumexp)
    TOKCREDIT_REDUCTION(moments)
#undef TOKCREDIT_REDUCTION
  }
}

} // namespace tokcredit
