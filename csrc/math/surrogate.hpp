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

template <class A> TOKCREDIT_FN A bounded(A x, A low, A high) { return x < low ? low : x > high ? high : x; }

template <class A> TOKCREDIT_FN Paid<A> surrogate(Surrogate kind, const Token<A> &t) {
  const A q = exponential(t.log_ratio);
  switch (kind) {
  case Surrogate::clip: {
    const bool below = t.log_ratio < t.low && t.advantage < A(0);
    const bool above = t.log_ratio > t.high && t.advantage > A(0);
    const A stopped = exponential(below ? t.low : t.high);
    A value = -t.advantage * (below || above ? stopped : q);
    A gradient = below || above || !t.moves ? A(0) : -t.advantage * q;
    const bool capped = t.advantage < A(0) && t.log_ratio > t.cap;
    if (capped) {
      value = -t.advantage * exponential(t.cap);
      gradient = A(0);
    }
    return {value, gradient, q, below, above, capped};
  }
  case Surrogate::weighted: {
    const A weight = exponential(bounded(t.log_ratio, t.low, t.high));
    return {-weight * t.advantage * t.log_prob, -weight * t.advantage, q,
            t.log_ratio<t.low, t.log_ratio> t.high, false};
  }
  case Surrogate::soft: {
    const A tau = t.advantage > A(0) ? t.high : t.low;
    const A gate = A(1) / (A(1) + exponential(-tau * (q - A(1))));
    return {-(A(4) / tau) * gate * t.advantage,
            t.moves ? -A(4) * gate * (A(1) - gate) * q * t.advantage : A(0),
            q,
            false,
            false,
            false};
  }
  case Surrogate::k1:
    return {t.advantage * t.log_ratio, t.moves ? t.advantage : A(0), q, false, false, false};
  case Surrogate::k2:
    return {t.advantage * t.log_ratio * t.log_ratio / A(2),
            t.moves ? t.advantage * t.log_ratio : A(0),
            q,
            false,
            false,
            false};
  default: {
    const A inverse = exponential(-t.log_ratio);
    return {t.advantage * (inverse + t.log_ratio - A(1)),
            t.moves ? t.advantage * (A(1) - inverse) : A(0),
            q,
            false,
            false,
            false};
  }
  }
}

} // namespace tokcredit
