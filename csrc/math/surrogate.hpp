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

// A is a floating type, or a pack of them: then all of this is done lane by lane.
template <class A> struct Token {
  A log_ratio; // already clamped; `moves` is false where the clamp cut its gradient
  A log_prob;
  A advantage;
  A low; // bounds on the log-ratio
  A high;
  A cap; // +inf for none
  mask_t<A> moves;
};

template <class A> struct Paid {
  A value;
  A gradient;
  A ratio;
  mask_t<A> below;  // the lower bound stopped this token
  mask_t<A> above;  // the upper bound did
  mask_t<A> capped; // the cap did
};

template <class A> TOKCREDIT_FN A bounded(A x, A low, A high) {
  x = choose(x < low, low, x);
  return choose(x > high, high, x);
}

// How much wider the window is at a position, counted from 1.
template <class A> TOKCREDIT_FN A growth(A position, A power) {
  return power == A(0) ? A(1) : power == A(0.5) ? std::sqrt(position) : std::pow(position, power);
}

// Which bound stops the log-ratio of a token, if one does.
template <class A> struct Stop {
  mask_t<A> below, above, capped;

  TOKCREDIT_FN explicit Stop(const Token<A> &t)
      : below((t.log_ratio < t.low) & (t.advantage < A{})),
        above((t.log_ratio > t.high) & (t.advantage > A{})),
        capped((t.log_ratio > t.cap) & (t.advantage < A{})) {}

  TOKCREDIT_FN mask_t<A> stops() const { return below | above | capped; }

  TOKCREDIT_FN A pick(A moving, A low, A high, A cap) const {
    A at = choose(below, low, moving);
    at = choose(above, high, at);
    return choose(capped, cap, at);
  }
};

// The clipped surrogate, with the ratio q and what it became.
template <class A> TOKCREDIT_FN Paid<A> clipped(const Token<A> &t, const Stop<A> &stop, A q, A stopped) {
  const A slope = choose(t.moves, -t.advantage * q, A{});
  return {-t.advantage * stopped, choose(stop.stops(), A{}, slope), q, stop.below, stop.above, stop.capped};
}

// Selects instead of branches, so that a loop over tokens becomes vector code.
template <Surrogate kind, class A> TOKCREDIT_FN Paid<A> surrogate(const Token<A> &t) {
  const A q = exponential(t.log_ratio), x = t.log_ratio, a = t.advantage, zero{};
  const mask_t<A> no{};
  if constexpr (kind == Surrogate::clip) {
    const Stop<A> stop(t);
    return clipped(t, stop, q, any(stop.stops()) ? exponential(stop.pick(x, t.low, t.high, t.cap)) : q);
  } else if constexpr (kind == Surrogate::weighted) {
    const A weight = exponential(bounded(x, t.low, t.high));
    return {-weight * a * t.log_prob, -weight * a, q, x<t.low, x> t.high, no};
  } else if constexpr (kind == Surrogate::soft) {
    const A tau = choose(a > zero, t.high, t.low);
    const A gate = 1 / (1 + exponential(-tau * (q - 1)));
    const A slope = -4 * gate * (1 - gate) * q * a;
    return {-(4 / tau) * gate * a, choose(t.moves, slope, zero), q, no, no, no};
  } else if constexpr (kind == Surrogate::k1) {
    return {a * x, choose(t.moves, a, zero), q, no, no, no};
  } else if constexpr (kind == Surrogate::k2) {
    return {a * x * x / 2, choose(t.moves, a * x, zero), q, no, no, no};
  } else {
    const A inverse = exponential(-x);
    return {a * (inverse + x - 1), choose(t.moves, a * (1 - inverse), zero), q, no, no, no};
  }
}

} // namespace tokcredit
