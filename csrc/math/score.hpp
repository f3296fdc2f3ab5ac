// What the score of one token does.
#pragma once
#include "math/exponential.hpp"
#include "math/moments.hpp"
#include "ops/score.hpp"

namespace tokcredit {

template <class A> TOKCREDIT_FN A floored_log(A x, double floor) {
  return log_of(x < A(floor) ? A(floor) : x); // NaN stays
}

// The moments of all tokens from those of rows, with the population variance.
TOKCREDIT_FN Moments<Reduction::moments> merged(const double *table, int64_t first, int64_t last) {
  Moments<Reduction::moments> all;
  for (int64_t r = first; r < last; ++r) {
    const double *row = table + r * width_of(Reduction::moments);
    Moments<Reduction::moments> part;
    part.count = row[int(Moment::size)];
    part.mean = row[int(Moment::mean)];
    part.square = row[int(Moment::var)] * part.count;
    part.minimum = row[int(Moment::minimum)];
    part.maximum = row[int(Moment::maximum)];
    all.merge(part);
  }
  return all;
}

// The rank of a quantile among `size`.
TOKCREDIT_FN int64_t nearest_rank(double quantile, double size) {
  return int64_t(std::rint(quantile * (size > 1 ? size - 1 : 0)));
}

// The distance from the quantile, with its divisors worked out once.
template <class A> struct Distance {
  A pivot, below, above;
  double spread, down, up;

  TOKCREDIT_FN Distance(const LogDeviation &d, const Moments<Reduction::moments> &m, A quantile)
      : pivot(quantile) {
    const double shift = m.mean - pivot, second = m.variance(0) + shift * shift;
    spread = std::sqrt(second < d.floor ? d.floor : second);
    const double least = d.floor * spread;
    // Written so that NaN stays.
    down = pivot - m.minimum < least ? least : pivot - m.minimum;
    up = m.maximum - pivot < least ? least : m.maximum - pivot;
    below = A(d.positive ? -down : down);
    above = A(up);
  }

  TOKCREDIT_FN A operator()(A v) const {
    const A distance = v - pivot;
    return distance / (distance > 0 ? above : below);
  }

  TOKCREDIT_FN void write(double *statistics) const {
    statistics[0] = pivot;
    statistics[1] = spread;
    statistics[2] = -down / spread;
    statistics[3] = up / spread;
  }
};

// What a score of 1 adds to a clip range, which may be infinite.
TOKCREDIT_FN double growth(double range, double widen) { return widen == 0 ? 0 : range * widen; }

template <class A> struct Bounds {
  A below, above;
};

// Both bounds, of which one is as it would be without a score.
template <class A> struct BoundsOf {
  A low, high, low_growth, high_growth;
  Bounds<A> plain;

  TOKCREDIT_FN static A bound(A range) { return log_of_one_plus(range < -1 ? A(-1) : range); }

  TOKCREDIT_FN BoundsOf(const ScoreBounds &s)
      : low(A(s.low)), high(A(s.high)), low_growth(A(growth(s.low, s.widen))),
        high_growth(A(growth(s.high, s.widen))), plain{bound(-low), bound(high)} {}

  TOKCREDIT_FN Bounds<A> operator()(A h) const {
    const A widened = bound(h > 0 ? h * high_growth + high : h * low_growth - low);
    return {h > 0 ? plain.below : widened, h > 0 ? widened : h <= 0 ? plain.above : h};
  }
};

// The factor, with the clip ranges.
template <class A> struct FactorOf {
  A low, high, low_growth, high_growth, strength, clamp_low, clamp_high;

  TOKCREDIT_FN FactorOf(const ScoreFactor &s)
      : low(A(s.low)), high(A(s.high)), low_growth(A(growth(s.low, s.widen))),
        high_growth(A(growth(s.high, s.widen))), strength(A(s.strength)), clamp_low(A(s.clamp_low)),
        clamp_high(A(s.clamp_high)) {}

  // Clamped; NaN stays.
  TOKCREDIT_FN A log_ratio(A log_prob, A reference) const {
    const A x = log_prob - reference;
    return x < clamp_low ? clamp_low : x > clamp_high ? clamp_high : x;
  }

  TOKCREDIT_FN A within(A h, A log_ratio, A below, A above) const {
    // How far the ratio has moved, twice.
    const A twice = 2 * (exponential(log_ratio) - 1);
    const A inner = twice > -below ? (twice < above ? A(1) : A(0)) : A(0);
    return strength * h * (h > 0 ? 1 - inner : inner) + 1;
  }
  TOKCREDIT_FN A operator()(A h, A log_ratio) const {
    return within(h, log_ratio, h > 0 ? low : low - h * low_growth, h > 0 ? high + h * high_growth : high);
  }
  TOKCREDIT_FN A operator()(A h, A log_ratio, A low_bound, A high_bound) const {
    return within(h, log_ratio, 1 - exponential(low_bound), exponential(high_bound) - 1);
  }
};

} // namespace tokcredit
