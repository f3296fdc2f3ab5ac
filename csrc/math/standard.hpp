// One number held against the moments of its group.
#pragma once
#include "math/number.hpp"
#include "ops/segment.hpp"
#include <cmath>

namespace tokcredit {

// a / b, and 0 for 0 / 0.
TOKCREDIT_FN double quotient(double a, double b) { return a == 0 ? 0 : a / b; }

TOKCREDIT_FN double standardized(double x, const double *moments, Standard standard, double epsilon) {
  const double size = moments[int(Moment::size)];
  const bool alone = size < 2;
  const double centred = alone ? x : x - moments[int(Moment::mean)];
  const double deviation = alone ? 1 : std::sqrt(moments[int(Moment::var)]);
  switch (standard) {
  case Standard::centred:
    return centred;
  case Standard::normalized:
    return quotient(centred, deviation + epsilon);
  case Standard::scaled:
    return quotient(x, deviation + epsilon);
  default:
    return alone ? 0 : centred * (size / (size - 1));
  }
}

// The body with the types of x and y.
template <class Call, class Body> void with_types(const Call &s, Body &&body) {
  const auto with_result = [&](auto x) { s.result == Type::f64 ? body(x, double{}) : body(x, float{}); };
  s.type == Type::f64 ? with_result(double{}) : with_result(float{});
}

template <class Body> void with_results(const RowAffine &a, Body &&body) {
  if (a.result != Type::b8)
    return with_types(a, body);
  a.type == Type::f64 ? body(double{}, bool{}) : body(float{}, bool{});
}

} // namespace tokcredit
