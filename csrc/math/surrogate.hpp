// Per-token surrogates: value and derivative with respect to the token's log-prob.
#pragma once
#include "math/exponential.hpp"

namespace tokcredit {

enum class Surrogate : int32_t {
  clip,     // max(-A q, -A clip(q)), and for A < 0 at most -A * cap
  weighted, // -clip(q) * A * log_prob, the weight held constant
  soft,     // -(4 / tau) * sigmoid(tau * (q - 1)) * A, tau = high where A > 0, else low
  k1,       // A * u             estimators of KL(current || other), u = log_prob - other
  k2,       // A * u^2 / 2
  k3        // A * (exp(-u) + u - 1)
};

template <class A> struct Token {
  A log_ratio; // already clamped; `moves` is false where the clamp cut its gradient
  A log_prob;
  A advantage;
  A low; // bounds on the log-ratio
  A high;
  A cap; // +inf for none
  bool moves;
};

template <class A> struct Paid {
  A value;
  A gradient;
  A ratio;
  bool below;  // the lower bound stopped this token
  bool above;  // the upper bound did
  bool capped; // the cap did
};

template <class A> TOKCREDIT_FN A bounded(A x, A low, A high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// How much wider the window is at a position, counted from 1.
template <class A> TOKCREDIT_FN A growth(A position, A power) {
  return power == A(0) ? A(1) : power == A(0.5) ? std::sqrt(position) : std::pow(position, power);
}

// Where the clipped surrogate stops the log-ratio, and by which bound.
template <class A> struct Stop {
  A at;
  bool below, above, capped;
};

template <class A> TOKCREDIT_FN Stop<A> stop(const Token<A> &t) {
  const A x = t.log_ratio, a = t.advantage;
  const bool below = (x < t.low) & (a < A(0)), above = (x > t.high) & (a > A(0));
  const bool capped = (x > t.cap) & (a < A(0));
  A at = below ? t.low : x;
  at = above ? t.high : at;
  at = capped ? t.cap : at;
  return {at, below, above, capped};
}

// Selects instead of branches, so that a loop over tokens becomes vector code.
template <Surrogate kind, class A> TOKCREDIT_FN Paid<A> surrogate(const Token<A> &t) {
  const A q = exponential(t.log_ratio), x = t.log_ratio, a = t.advantage;
  if constexpr (kind == Surrogate::clip) {
    const Stop<A> s = stop(t);
    const A gradient = s.below | s.above | s.capped | !t.moves ? A(0) : -a * q;
    return {-a * exponential(s.at), gradient, q, s.below, s.above, s.capped};
  } else if constexpr (kind == Surrogate::weighted) {
    const A weight = exponential(bounded(x, t.low, t.high));
    return {-weight * a * t.log_prob, -weight * a, q, x<t.low, x> t.high, false};
  } else if constexpr (kind == Surrogate::soft) {
    const A tau = a > A(0) ? t.high : t.low;
    const A gate = A(1) / (A(1) + exponential(-tau * (q - A(1))));
    const A slope = -A(4) * gate * (A(1) - gate) * q * a;
    return {-(A(4) / tau) * gate * a, t.moves ? slope : A(0), q, false, false, false};
  } else if constexpr (kind == Surrogate::k1) {
    return {a * x, t.moves ? a : A(0), q, false, false, false};
  } else if constexpr (kind == Surrogate::k2) {
    return {a * x * x / A(2), t.moves ? a * x : A(0), q, false, false, false};
  } else {
    const A inverse = exponential(-x);
    return {a * (inverse + x - A(1)), t.moves ? a * (A(1) - inverse) : A(0), q, false, false, false};
  }
}

} // namespace tokcredit
