// A mean kept as the distance from the first number seen, so that the mean of equal numbers is that number.
#pragma once
#include "math/number.hpp"

namespace tokcredit {

struct Mean {
  double count = 0, first = 0, excess = 0;

  TOKCREDIT_FN void add(double x) {
    if (count == 0)
      first = x;
    count += 1;
    excess += x - first;
  }

  TOKCREDIT_FN void merge(const Mean &o) {
    if (o.count == 0)
      return;
    if (count == 0)
      first = o.first;
    count += o.count;
    excess += o.excess + o.count * (o.first - first);
  }

  TOKCREDIT_FN double value() const { return count > 0 ? first + excess / count : 0; }
};

} // namespace tokcredit
