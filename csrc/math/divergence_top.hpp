// A divergence over the ids that a teacher gives, and what is outside of them. In double.
#pragma once
#include "math/divergence.hpp"
#include "ops/divergence_top.hpp"

namespace tokcredit {

TOKCREDIT_FN int64_t id_at(const TopRows &in, int64_t place) {
  return in.id_type == Type::i64 ? static_cast<const int64_t *>(in.ids)[place]
                                 : int64_t(static_cast<const int32_t *>(in.ids)[place]);
}

// The outcomes of a row once the masses of both on the ids are known.
struct Outcomes {
  Outside outside;
  double share;
  double p_inside, q_inside, log_p_rest;
  double log_q_rest = -double(INFINITY);
  double log_p_by = 0, log_q_by = 0; // what the distributions over the ids are divided by

  TOKCREDIT_FN Outcomes(Outside outside, double share, double p_inside, double q_inside, double log_p_rest)
      : outside(outside), share(share), p_inside(p_inside), q_inside(q_inside), log_p_rest(log_p_rest) {
    if (outside == Outside::renormalised) {
      log_p_by = std::log(p_inside);
      log_q_by = std::log(q_inside);
    } else if (outside == Outside::bucket) {
      const double least = 1e-7, rest = 1 - q_inside;
      if (!(rest <= least)) // or NaN
        log_q_rest = std::log(rest);
      else if (log_p_rest > -double(INFINITY))
        log_q_rest = std::log(least);
    }
  }

  TOKCREDIT_FN double log_p(double of_vocabulary) const { return of_vocabulary - log_p_by; }
  TOKCREDIT_FN double log_q(double of_vocabulary) const { return of_vocabulary - log_q_by; }

  template <Divergence kind> TOKCREDIT_FN Terms<double> terms(double log_p_of_id, double log_q_of_id) const {
    const double p = log_p(log_p_of_id), q = log_q(log_q_of_id);
    return divergence_terms<kind>(p, q, q - p, share);
  }

  // Those of all outcomes, from the sum over the ids.
  template <Divergence kind> TOKCREDIT_FN Terms<double> total(Terms<double> sum) const {
    if (outside == Outside::bucket) {
      const Terms<double> rest =
          divergence_terms<kind>(log_p_rest, log_q_rest, log_q_rest - log_p_rest, share);
      sum.value += rest.value;
      sum.slope += rest.slope;
    } else if (outside == Outside::cut && kind == Divergence::reverse_kl) {
      sum.slope += p_inside - 1; // the slope of p log p has a 1, which otherwise drops out
    }
    return sum;
  }

  // The derivative by the logit of an id.
  template <Divergence kind>
  TOKCREDIT_FN double slope(double log_p_of_id, double log_q_of_id, double sum) const {
    const double p = log_p(log_p_of_id), q = log_q(log_q_of_id);
    const double out = divergence_slope<kind>(p, q, q - p, share, sum);
    if (outside == Outside::cut && kind == Divergence::forward_kl)
      return out - (1 - q_inside) * std::exp(log_p_of_id);
    return out;
  }

  // The derivative by the logit of any other token, divided by its probability.
  template <Divergence kind> TOKCREDIT_FN double slope_outside(double sum) const {
    if (outside == Outside::renormalised)
      return 0;
    if (outside == Outside::cut)
      return kind == Divergence::forward_kl ? q_inside : -(sum + 1);
    const double p = std::exp(log_p_rest);
    return p > 0 ? divergence_slope<kind>(log_p_rest, log_q_rest, log_q_rest - log_p_rest, share, sum) / p
                 : 0;
  }
};

} // namespace tokcredit
