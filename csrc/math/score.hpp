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

template <class A> struct Bounds {
  A below, above;
};

// Both bounds, of which one is as it would be without a score.
template <class A> struct BoundsOf {
  A low, high, low_growth, high_growth;
  Bounds<A> plain;

  TOKCREDIT_FN static A bound(A range) { return log_of_one_plus(range < -1 ? A(-1) : range); }

  TOKCREDIT_FN BoundsOf(const ScoreBounds &s)
      : low(A(s.low)), high(A(s.high)), low_growth(A(s.low * s.widen)), high_growth(A(s.high * s.widen)),
        plain{bound(-low), bound(high)} {}

  TOKCREDIT_FN Bounds<A> operator()(A h) const {
    const A widened = bound(h > 0 ? h * high_growth + high : h * low_growth - low);
    return {h > 0 ? plain.below : widened, h > 0 ? widened : h <= 0 ? plain.above : h};
  }
};

// The factor, from the exponentials of the bounds.
template <class A> TOKCREDIT_FN A factor_of(A h, A log_ratio, A low, A high, A strength) {
  const A twice = 2 * exponential(log_ratio) - 1;
  const A inner = twice > low ? (twice < high ? A(1) : A(0)) : A(0);
  return strength * h * (h > 0 ? 1 - inner : inner) + 1;
}

} // namespace tokcredit
