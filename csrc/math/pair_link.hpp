// The functions that links are made of, with two derivatives, in double.
#pragma once
#include "math/number.hpp"
#include "ops/pair_link.hpp"
#include <cmath>

namespace tokcredit {

// A function of one number.
struct Curve {
  double value, slope, bend;
};

// sigmoid(x), sigmoid(-x) and log sigmoid(x), none of which loses its digits.
struct Sigmoid {
  double of, of_minus, log;

  TOKCREDIT_FN explicit Sigmoid(double x) {
    const double small = std::exp(x < 0 ? x : -x), larger = 1 / (1 + small), smaller = small * larger;
    of = x < 0 ? smaller : larger; // NaN stays
    of_minus = x < 0 ? larger : smaller;
    log = (x < 0 ? x : 0) - std::log1p(small);
  }
};

TOKCREDIT_FN Curve logistic(double x) {
  const Sigmoid s(x);
  return {-s.log, -s.of_minus, s.of * s.of_minus};
}

TOKCREDIT_FN Curve hinge(double x) { return {x <= 0 ? 0 : x, x <= 0 ? 0 : x > 0 ? 1 : x, 0}; }

TOKCREDIT_FN Curve sigmoid(double x) {
  const Sigmoid s(x);
  const double slope = s.of * s.of_minus;
  return {s.of, slope, slope * (s.of_minus - s.of)};
}

TOKCREDIT_FN Curve entropy(double x, double parameter) {
  const Sigmoid s(x);
  const double slope = s.of * s.of_minus, log = s.log - parameter;
  return {s.of == 0 ? 0 : s.of * log, slope == 0 ? 0 : slope * (log + 1),
          slope == 0 ? 0 : slope * ((s.of_minus - s.of) * (log + 1) + s.of_minus)};
}

TOKCREDIT_FN Curve blend(double x, double parameter) {
  const Sigmoid s(x), k(x / parameter);
  const double first = k.of * k.of_minus / parameter, second = first * (k.of_minus - k.of) / parameter,
               power = std::exp(-x);
  // 0 times infinity far below 0, where all of the weight is on the other function.
  const auto of_power = [&](double factor) { return factor == 0 ? 0 : factor * power; };
  const auto of_log = [&](double factor) { return factor == 0 ? 0 : factor * s.log; };
  return {of_power(k.of) - k.of_minus * s.log,
          of_power(first - k.of) + of_log(first) - k.of_minus * s.of_minus,
          of_power(second - 2 * first + k.of) + of_log(second) + 2 * first * s.of_minus +
              k.of_minus * s.of * s.of_minus};
}

TOKCREDIT_FN Curve curve(const LinkTerm &t, double x) {
  switch (t.function) {
  case LinkFunction::logistic:
    return logistic(x);
  case LinkFunction::square:
    return {x * x, 2 * x, 2};
  case LinkFunction::hinge:
    return hinge(x);
  case LinkFunction::sigmoid:
    return sigmoid(x);
  case LinkFunction::entropy:
    return entropy(x, t.parameter);
  default:
    return blend(x, t.parameter);
  }
}

// The row of pair p in place `side` (0 chosen, 1 rejected).
TOKCREDIT_FN int64_t row_of(const PairLink &l, int64_t p, int side) {
  return l.pairs ? l.pairs[2 * p + side] : 2 * p + side;
}

TOKCREDIT_FN double divisor_of(const PairLink &l, int64_t row) {
  return l.divisors && l.divisors[row] > 1 ? double(l.divisors[row]) : 1;
}

template <class A> TOKCREDIT_FN double score_of(const PairLink &l, int64_t row) {
  return double(static_cast<const A *>(l.scores)[row]) / divisor_of(l, row);
}

// Writes a pair's row of the table and its slopes, and returns its share of the total.
template <class A> TOKCREDIT_FN double link_pair(const PairLink &l, int64_t p) {
  const int64_t chosen = row_of(l, p, 0), rejected = row_of(l, p, 1);
  double *out = l.table + p * pair_columns;
  double sum[pair_columns] = {0, score_of<A>(l, chosen), score_of<A>(l, rejected)};
  for (int i = 0; i < l.term_count; ++i) {
    const LinkTerm &t = l.terms[i];
    // A score with the factor 0 takes no part, even if it is infinite.
    const Curve c = curve(t, (t.chosen == 0 ? 0 : t.chosen * sum[1]) +
                                 (t.rejected == 0 ? 0 : t.rejected * sum[2]) + t.shift);
    sum[0] += t.weight * c.value;
    const double slope = t.weight * c.slope, bend = t.weight * c.bend;
    sum[3] += t.chosen == 0 ? 0 : slope * t.chosen;
    sum[4] += t.rejected == 0 ? 0 : slope * t.rejected;
    sum[5] += t.chosen == 0 ? 0 : bend * t.chosen * t.chosen;
    sum[6] += t.chosen == 0 || t.rejected == 0 ? 0 : bend * t.chosen * t.rejected;
    sum[7] += t.rejected == 0 ? 0 : bend * t.rejected * t.rejected;
  }
  const double weight = l.scale * (l.weights ? l.weights[p] : 1);
  A *slopes = static_cast<A *>(l.slopes);
  for (int side = 0; side < 2; ++side) {
    double &slope = sum[3 + side];
    slope = sum[0] != sum[0] ? sum[0] : slope;
    const int64_t row = side == 0 ? chosen : rejected;
    slopes[row] = A(weight * slope / divisor_of(l, row));
  }
  for (int i = 0; i < pair_columns; ++i)
    out[i] = sum[i];
  return weight * sum[0];
}

} // namespace tokcredit
