// How many of a scope's elements are wanted.
#pragma once
#include "math/number.hpp"
#include "ops/select.hpp"
#include <cmath>

namespace tokcredit {

TOKCREDIT_FN int64_t wanted_of(const Quota &q, int64_t scope, int64_t size) {
  if (q.number)
    return q.number[scope];
  const double exact = q.share * double(size);
  const double rounded = q.rounding == Rounding::up     ? std::ceil(exact - 1e-9)
                         : q.rounding == Rounding::down ? std::floor(exact + 1e-9)
                                                        : std::rint(exact);
  return rounded < double(q.least) ? q.least : int64_t(rounded);
}

} // namespace tokcredit
