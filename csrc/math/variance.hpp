// The subset of given size with the largest variance.
#pragma once
#include "math/number.hpp"

namespace tokcredit {

// Of numbers at(0) >= at(1) >= ... >= at(size - 1): how many of the first ones belong to the `keep` numbers
// whose variance is largest, the others being the last ones. Among equals the fewest, or with `largest` all
// of them if these are among the equals. 0 < keep <= size.
template <class At> TOKCREDIT_FN int64_t most_varied(int64_t size, int64_t keep, bool largest, At &&at) {
  // About the mean, so that the sums of squares keep their digits.
  double mean = 0;
  for (int64_t i = 0; i < size; ++i)
    mean += at(i) / double(size);
  double all = 0, sum = 0, square = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double x = at(i) - mean;
    all += x * x;
    if (i >= size - keep) {
      sum += x;
      square += x * x;
    }
  }
  const double rounding = 1e-12 * all / double(keep); // variances that differ by less are equal
  int64_t best = 0;
  double most = -1;
  for (int64_t i = 0;; ++i) {
    const double variance = square / double(keep) - sum / double(keep) * (sum / double(keep));
    if (variance > most + rounding) {
      most = variance;
      best = i;
    }
    if (i == keep)
      return largest && variance >= most - rounding ? keep : best;
    const double in = at(i) - mean, out = at(size - keep + i) - mean;
    sum += in - out;
    square += in * in - out * out;
  }
}

} // namespace tokcredit
