// What one token adds to a divergence between two distributions, and its slope. p and q are its
// probabilities, delta = log q - log p; c is the share of q in the mixture m = c * q + (1 - c) * p. For
// numbers and for packs.
#pragma once
#include "math/exponential.hpp"
#include "ops/divergence.hpp"
#include <type_traits>

namespace tokcredit {

constexpr bool has_mixture(Divergence kind) {
  return kind != Divergence::forward_kl && kind != Divergence::reverse_kl;
}

// The logit of a mixture of two teachers.
template <class A> TOKCREDIT_FN A mixed(A logit, A other, A weight) {
  return choose(logit == A(-INFINITY), logit, logit + weight * (logit - other));
}

// What is added to the student's logits before they are subtracted from the teacher's, of about the distance
// between the two. Nothing where they are as close as models of one kind are: the difference keeps its
// digits.
template <class A> TOKCREDIT_FN A offset(A apart) { return apart > A(-4) && apart < A(4) ? A(0) : apart; }

// x * inverse - off, off in two parts so that what is left keeps its digits when the logits are large.
template <class A> struct Shift {
  A center, rest;
  TOKCREDIT_FN Shift(A whole, double off, double temperature)
      : center(whole), rest(A(off - double(whole) / temperature)) {}
};

// log p, log q and log q - log p from the logits of both and their logsumexp. A is the type of a number, X
// that of a number or a pack.
template <class A> struct LogProbs {
  double student, teacher, by;
  A inverse;
  Shift<A> p, q, between;

  TOKCREDIT_FN LogProbs(const double *logsumexp, double temperature)
      : student(logsumexp[0]), teacher(logsumexp[1]), by(temperature), inverse(A(1 / temperature)),
        p(A(student * by), student, by), q(A(teacher * by), teacher, by),
        between(offset(A((teacher - student) * by)), teacher - student, by) {}

  template <class X> TOKCREDIT_FN X log_p(const X &s) const { return (s - p.center) * inverse - p.rest; }
  template <class X> TOKCREDIT_FN X log_q(const X &t) const { return (t - q.center) * inverse - q.rest; }
  template <class X> TOKCREDIT_FN X delta(const X &s, const X &t) const {
    return (t - (s + between.center)) * inverse - between.rest;
  }

  TOKCREDIT_FN double exact_log_p(double s) const { return s / by - student; }
  TOKCREDIT_FN double exact_log_q(double t) const { return t / by - teacher; }
  TOKCREDIT_FN double exact_delta(double s, double t) const { return (t - s) / by - (teacher - student); }
};

// Whether p or q is above 1/2: computed in double, what is left to 1 keeps its digits.
template <class A> TOKCREDIT_FN auto is_large(A log_p, A log_q) {
  const A half = -0.6931472f;
  return (log_p > half) | (log_q > half);
}

// Of a number beyond this exp underflows; a finite one keeps 0 * delta at 0 where a logit is -inf.
TOKCREDIT_FN float far(float) { return 120.0f; }
TOKCREDIT_FN double far(double) { return 760.0; }

// delta is given beside the logs, because their difference would lose digits where p and q are close.
template <class A, class Number> struct Point {
  A p, q, delta;
  mask_t<A> q_is_larger;
  A larger, rest; // the larger of p and q; the smaller divided by it, less 1

  TOKCREDIT_FN Point(A log_p, A log_q, A between) {
    const A most = far(Number());
    delta = choose(between < most, between, most); // NaN of -inf less -inf as well
    delta = at_least(delta, -most);
    q_is_larger = delta > A{};
    larger = exponential(choose(q_is_larger, log_q, log_p));
    const Exponentials<A> e = exponentials(choose(q_is_larger, -delta, delta));
    rest = e.less_one;
    const A smaller = larger * e.value;
    p = choose(q_is_larger, smaller, larger);
    q = choose(q_is_larger, larger, smaller);
  }

  // log(m / p) and log(q / m)
  struct Logs {
    A m_by_p, q_by_m;
  };
  TOKCREDIT_FN Logs logs(Number c) const {
    const A l = log_one_plus(weight(c) * rest);
    return {choose(q_is_larger, delta + l, l), choose(q_is_larger, -l, delta - l)};
  }

  // q / m - 1
  TOKCREDIT_FN A excess(Number c) const {
    const A x = rest / (weight(c) * rest + A(Number(1))) * (Number(1) - c);
    return choose(q_is_larger, -x, x);
  }

  TOKCREDIT_FN A q_less_p() const { return choose(q_is_larger, -(larger * rest), larger * rest); }

private:
  // m = larger of p and q * (1 + weight * rest)
  TOKCREDIT_FN A weight(Number c) const { return choose(q_is_larger, A(Number(1) - c), A(c)); }
};

template <class A> struct Terms {
  A value;
  A slope; // summed over the row it is what the slope of each token subtracts
};

// KL(p || q) has a slope whose sum is its value, and that of KL(q || p) subtracts nothing. A skewed
// divergence has the difference of m and its first distribution added, whose sum is 0: so no term is below 0,
// and what a logsumexp is off by hardly counts.
template <Divergence kind, class A, class Number>
TOKCREDIT_FN Terms<A> divergence_terms(A log_p, A log_q, A delta, Number c) {
  if constexpr (kind == Divergence::forward_kl) {
    const A q = exponential(log_q);
    return {choose(q > A{}, q * delta, A{}), A{}};
  } else if constexpr (kind == Divergence::reverse_kl) {
    const A p = exponential(log_p), value = choose(p > A{}, -(p * delta), A{});
    return {value, value};
  } else {
    const Point<A, Number> at(log_p, log_q, delta);
    if constexpr (kind == Divergence::skew_forward) {
      return {at.q * at.logs(c).q_by_m - at.q_less_p() * (Number(1) - c), at.p * at.excess(c)};
    } else {
      const auto logs = at.logs(c);
      const A to_p = -(at.p * logs.m_by_p);
      if constexpr (kind == Divergence::js)
        return {at.q * logs.q_by_m * c + to_p * (Number(1) - c), to_p};
      else
        return {to_p + at.q_less_p() * c, to_p + at.p * at.excess(c) * c};
    }
  }
}

// The derivative of the row's value by the token's logit of p; `sum` is that of the slopes above.
template <Divergence kind, class A, class Number>
TOKCREDIT_FN A divergence_slope(A log_p, A log_q, A delta, Number c, A sum) {
  if constexpr (kind == Divergence::reverse_kl) {
    const A p = exponential(log_p);
    return choose(p > A{}, -(p * (delta + sum)), A{});
  } else {
    const Point<A, Number> at(log_p, log_q, delta);
    if constexpr (kind == Divergence::forward_kl)
      return -at.q_less_p();
    else if constexpr (kind == Divergence::js)
      return -(at.p * (at.logs(c).m_by_p + sum)) * (Number(1) - c);
    else if constexpr (kind == Divergence::skew_forward)
      return at.p * (sum - at.excess(c)) * (Number(1) - c);
    else
      return at.p * (at.excess(c) * c - at.logs(c).m_by_p - sum);
  }
}

template <Divergence kind, class A>
TOKCREDIT_FN void add_exact_terms(Terms<double> &sum, const LogProbs<A> &at, double s, double t, double c) {
  const Terms<double> terms =
      divergence_terms<kind>(at.exact_log_p(s), at.exact_log_q(t), at.exact_delta(s, t), c);
  sum.value += terms.value;
  sum.slope += terms.slope;
}

template <Divergence kind, class A>
TOKCREDIT_FN double exact_slope(const LogProbs<A> &at, double s, double t, double c, double sum) {
  return divergence_slope<kind>(at.exact_log_p(s), at.exact_log_q(t), at.exact_delta(s, t), c, sum);
}

// The body with the kind as a template argument.
template <class Body> void with_divergence(Divergence kind, Body &&body) {
  switch (kind) {
#define TOKCREDIT_DIVERGENCE(name)                                                                           \
  case Divergence::name:                                                                                     \
    return body(std::integral_constant<Divergence, Divergence::name>{});
    TOKCREDIT_DIVERGENCE(forward_kl)
    TOKCREDIT_DIVERGENCE(reverse_kl)
    TOKCREDIT_DIVERGENCE(js)
    TOKCREDIT_DIVERGENCE(skew_forward)
    TOKCREDIT_DIVERGENCE(skew_reverse)
#undef TOKCREDIT_DIVERGENCE
  }
}

} // namespace tokcredit
