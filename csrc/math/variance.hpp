// The subset of given size with the largest variance.
#pragma once
#include "math/number.hpp"

namespace tokcredit {

// Of numbers at(0) >= at(1) >= ... >= at(size - 1): how many of the first ones belong to the `keep` numbers
// whose variance is largest, the others being the last ones; the fewest among equals. 0 < keep <= size.
template <class At> TOKCREDIT_FN int64_t most_varied(int64_t size, int64_t keep, At &&at) {
  // About the mean, so that the sums of squares keep their digits.
  double mean = 0;
  for (int64_t i = 0; i < size; ++i)
    mean += at(i) / double(size);
  double sum = 0, square = 0;
  for (int64_t i = size - keep; i < size; ++i) {
    const double x = at(i) - mean;
    sum += x;
    square += x * x;
  }
  int64_t best = 0;
  double most = -1;
  for (int64_t i = 0;; ++i) {
    const double variance = square / double(keep) - sum / double(keep) * (sum / double(keep));
    if (variance > most * (1 + 1e-12) + 1e-300) {
      most = variance;
      best = i;
    }
    if (i == keep)
      return best;
    const double in = at(i) - mean, out = at(size - keep + i) - mean;
    sum += in - out;
    square += in * in - out * out;
  }
}

} // namespace tokcredit
