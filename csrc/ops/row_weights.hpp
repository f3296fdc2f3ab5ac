// The weight of each row's tokens in a loss that is a mean over tokens or rows. With one count of all rows,
// given, or counted from the rows' training tokens:
//     count = sum of lengths (tokens) or the number of lengths above 0 (rows)
//     y[r] = factor / (max(count, 1) * max(lengths[r], 1))     by_length
//     y[0] = factor / (max(count, 1) * length)                 otherwise, the same for every row
//
//     lengths 2 0 4   rows, by_length, factor 1   y .25 .5 .125
//
// Must read: lengths; must write: y.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

TOKCREDIT_ENUM(Counted, tokens, rows)

struct RowWeights {
  const int64_t *lengths; // [R]
  int64_t rows;
  int64_t given; // the count, or below 0: counted
  Counted counted;
  bool by_length;
  double length;
  double factor;
  double *y; // [R], or one number
};

namespace cpu {
void row_weights(const RowWeights &);
} // namespace cpu
namespace cuda {
class Queue;
void row_weights(const RowWeights &, Queue &);
} // namespace cuda

} // namespace tokcredit
