// What the score of one token does.
#pragma once
#include "math/exponential.hpp"
#include "ops/score.hpp"
#include "ops/segment.hpp"

namespace tokcredit {

// The distance from a pivot, with its divisors worked out once.
template <class A> struct DeviationOf {
  A pivot, below, above;

  TOKCREDIT_FN DeviationOf(const Deviation &d) : pivot(*static_cast<const A *>(d.pivot)) {
    const double shift = d.moments[int(Moment::mean)] - pivot;
    const double second = d.moments[int(Moment::var)] + shift * shift;
    const double least = d.floor * std::sqrt(second < d.floor ? d.floor : second);
    const double down = pivot - d.moments[int(Moment::minimum)],
                 up = d.moments[int(Moment::maximum)] - pivot;
    // Written so that NaN stays.
    below = A(down < least ? least : down) * (d.positive ? -1 : 1);
    above = A(up < least ? least : up);
  }

  TOKCREDIT_FN A operator()(A x) const {
    const A distance = x - pivot;
    return distance / (distance > 0 ? above : below);
  }
};

// The lower and the upper bound.
template <class A> struct BoundsOf {
  A low, high, low_growth, high_growth;

  TOKCREDIT_FN BoundsOf(const ScoreBounds &s)
      : low(A(s.low)), high(A(s.high)), low_growth(A(s.low * s.widen)), high_growth(A(s.high * s.widen)) {}

  TOKCREDIT_FN A below(A h) const {
    const A range = (h > 0 ? A(0) : h) * low_growth - low;
    return log_of_one_plus(range < -1 ? A(-1) : range);
  }
  TOKCREDIT_FN A above(A h) const { return log_of_one_plus((h < 0 ? A(0) : h) * high_growth + high); }
};

// The factor, from the exponentials of the bounds.
template <class A> TOKCREDIT_FN A factor_of(A h, A log_ratio, A low, A high, A strength) {
  const A twice = 2 * exponential(log_ratio) - 1;
  const bool inner = (twice > low) & (twice < high);
  return strength * h * A((h > 0) != inner) + 1;
}

} // namespace tokcredit
