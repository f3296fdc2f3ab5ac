// Per-token surrogates: value and derivative with respect to the token's log-prob, as ops/policy_loss.hpp
// defines them. Written for a number or for a pack of them: then all of it is done lane by lane, with selects
// in place of branches. A comparison with NaN is false, so NaN takes the ordinary way through every select.
#pragma once
#include "math/exponential.hpp"
#include "ops/policy_loss.hpp"
#include <type_traits>

namespace tokcredit {

template <class A> struct Token {
  A log_ratio;  // before the clamp
  A difference; // likewise
  A log_prob, reference;
  A advantage;
  A low, high, cap; // widened already
  A outside_low, outside_high, given;
};

template <class A> struct Outcome {
  A value, slope;
  A log_ratio, ratio; // x and q
  mask_t<A> below, above, capped;
};

template <class A> TOKCREDIT_FN A bounded(A x, A low, A high) {
  x = choose(x < low, low, x);
  return choose(x > high, high, x);
}
#ifdef __CUDA_ARCH__
TOKCREDIT_FN float bounded(float x, float low, float high) { // two instructions
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(y), "f"(high));
  return x;
}
#endif

template <class A> TOKCREDIT_FN A sign(A x) {
  const A positive = choose(x > A{}, A(1), x); // NaN stays
  return choose(x < A{}, A(-1), positive);
}

// How much wider the window is at a position, counted from 1.
template <class A> TOKCREDIT_FN A growth(A position, A power) {
  return power == A(0) ? A(1) : power == A(0.5) ? std::sqrt(position) : std::pow(position, power);
}

// A log-ratio within the clamp of the call, and where the clamp holds it; NaN counts as held.
template <class A> struct Clamped {
  A x;
  mask_t<A> held;

  TOKCREDIT_FN Clamped(A raw, A low, A high) : x(bounded(raw, low, high)), held(x != raw) {}
  TOKCREDIT_FN Clamped(A raw, const PolicyLoss &p) : Clamped(raw, A(p.clamp_low), A(p.clamp_high)) {}
};

// Which bound stops a token under `clip`, if one does.
template <class A> struct Stop {
  mask_t<A> below, above, capped;

  TOKCREDIT_FN Stop(const Token<A> &t, A x)
      : below((x < t.low) & (t.advantage < A{})), above((x > t.high) & (t.advantage > A{})),
        capped((x > t.cap) & (t.advantage < A{})) {}

  TOKCREDIT_FN mask_t<A> stops() const { return below | above | capped; }

  TOKCREDIT_FN A pick(A moving, A low, A high, A cap) const {
    A at = choose(below, low, moving);
    at = choose(above, high, at);
    return choose(capped, cap, at);
  }
};

// The clipped surrogate; `stopped` is what the ratio became.
template <class A>
TOKCREDIT_FN Outcome<A> clipped(const Token<A> &t, const Clamped<A> &c, const Stop<A> &stop, A q, A stopped) {
  return {-t.advantage * stopped,
          choose(stop.stops() | c.held, A{}, -t.advantage * q),
          c.x,
          q,
          stop.below,
          stop.above,
          stop.capped};
}

template <class A> TOKCREDIT_FN Outcome<A> clip(const Token<A> &t, const PolicyLoss &p) {
  const Clamped<A> c(t.log_ratio, p);
  const A q = exponential(c.x);
  const Stop<A> stop(t, c.x);
  return clipped(t, c, stop, q, any(stop.stops()) ? exponential(stop.pick(c.x, t.low, t.high, t.cap)) : q);
}

template <class A> TOKCREDIT_FN Outcome<A> soft(const Token<A> &t, const PolicyLoss &p) {
  const Clamped<A> c(t.log_ratio, p);
  const mask_t<A> no{};
  const A q = exponential(c.x), a = t.advantage, tau = choose(a > A{}, t.high, t.low);
  const A s = 1 / (1 + exponential(-tau * (q - 1)));
  return {-(4 / tau) * s * a, choose(c.held, A{}, -4 * s * (1 - s) * q * a), c.x, q, no, no, no};
}

// 1 - exp(x), not below 0, and away from it before a logarithm.
template <class A> TOKCREDIT_FN A remainder(A x) {
  const A rest = -exponential_less_one(x);
  return choose(rest < A{}, A{}, rest);
}

// KL divergence from probability exp(o) to exp(l), of the two outcomes "this token" and "another".
template <class A> TOKCREDIT_FN A binary_divergence(A o, A l) {
  const A p = exponential(o), rest = remainder(o);
  const A here = choose(p == A{}, A{}, p * (o - l));
  return here + rest * logarithm((rest + A(1e-8)) / (remainder(l) + A(1e-8)));
}

// What the gate looks at.
template <class A> TOKCREDIT_FN A coordinate(const Token<A> &t, A x, Coordinate on) {
  switch (on) {
  case Coordinate::ratio:
    return x;
  case Coordinate::difference:
    return t.difference;
  case Coordinate::probability:
    return exponential(t.log_prob) - exponential(t.reference);
  case Coordinate::binary_kl:
    return sign(t.difference) * binary_divergence(t.reference, t.log_prob);
  case Coordinate::given:
    break;
  }
  return sign(t.difference) * t.given;
}

template <class A> TOKCREDIT_FN Outcome<A> gated(const Token<A> &t, const PolicyLoss &p) {
  const A x = Clamped<A>(t.log_ratio, p).x, a = t.advantage, c = coordinate(t, x, p.on);
  mask_t<A> below = c<t.low, above = c> t.high;
  if (!p.both_sides) {
    below = below & (a < A{});
    above = above & (a > A{});
  }
  A held = choose(x > t.cap, t.cap, x);
  if (p.on == Coordinate::ratio) {
    held = choose(below, t.low, held);
    held = choose(above, t.high, held);
  }
  A share = choose(below, t.outside_low, A(1));
  share = choose(above, t.outside_high, share);
  A whole = -a * exponential(held);
  whole = choose(c == c, whole, c); // a NaN would leave the gate open
  // 0 by selection, so that an infinite weight or log-prob behind a closed gate stays out.
  const mask_t<A> closed = share == A{};
  const A slope = choose(closed & (whole == whole), A{}, whole * share);
  const A value = p.gated_value == GatedValue::score   ? choose(slope == A{}, A{}, slope * t.log_prob)
                  : p.gated_value == GatedValue::ratio ? slope
                                                       : whole;
  return {value, slope, x, exponential(x), below, above, x > t.cap};
}

// The estimators of a KL divergence.
template <class A> TOKCREDIT_FN Outcome<A> kl(const Token<A> &t, const PolicyLoss &p) {
  const Clamped<A> c(t.difference, p);
  const A u = c.x, x = Clamped<A>(t.log_ratio, p).x, q = exponential(x);
  const mask_t<A> no{};
  A value{}, slope{};
  switch (p.surrogate) {
  case Surrogate::k1:
    value = u;
    slope = A(1);
    break;
  case Surrogate::k2:
    value = u * u / 2;
    slope = u;
    break;
  case Surrogate::abs:
    slope = sign(u);
    value = u * slope;
    break;
  default: {
    const A inverse = exponential(-u);
    value = inverse + u - 1;
    slope = 1 - inverse;
    if (p.surrogate == Surrogate::k3_corrected) {
      const A correction = p.source == Source::difference ? A(1) : q;
      value = correction * value;
      slope = correction * u;
    }
  }
  }
  const A limit = A(p.limit);
  const mask_t<A> over = (value > limit) | (value < -limit);
  return {t.advantage * bounded(value, -limit, limit),
          choose(over | c.held, A{}, t.advantage * slope),
          x,
          q,
          no,
          no,
          no};
}

// The surrogates that one loop serves: `clip`, `soft`, `gated`, and k1 for all that estimate a divergence.
template <Surrogate kind, class A> TOKCREDIT_FN Outcome<A> surrogate(const Token<A> &t, const PolicyLoss &p) {
  Outcome<A> out;
  if constexpr (kind == Surrogate::clip)
    out = clip(t, p);
  else if constexpr (kind == Surrogate::soft)
    out = soft(t, p);
  else if constexpr (kind == Surrogate::gated)
    out = gated(t, p);
  else
    out = kl(t, p);
  return out;
}

// Calls body(kind), a constant, with the loop that serves a surrogate.
template <class Body> void with_surrogate(Surrogate surrogate, Body &&body) {
  switch (surrogate) {
  case Surrogate::clip:
    return body(std::integral_constant<Surrogate, Surrogate::clip>{});
  case Surrogate::soft:
    return body(std::integral_constant<Surrogate, Surrogate::soft>{});
  case Surrogate::gated:
    return body(std::integral_constant<Surrogate, Surrogate::gated>{});
  default:
    return body(std::integral_constant<Surrogate, Surrogate::k1>{});
  }
}

// NaN in the log-prob, the reference or the value reaches value and slope, also where a formula selects it
// away. `probe` is NaN where the log-prob or the reference is.
template <class A> TOKCREDIT_FN void spread_nan(Outcome<A> &out, A probe) {
  out.value = choose(probe == probe, out.value, probe);
  out.slope = choose(out.value == out.value, out.slope, out.value);
}

} // namespace tokcredit
