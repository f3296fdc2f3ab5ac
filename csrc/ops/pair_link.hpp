// The loss of preference pairs from the scores of their rows, and its derivatives. With the rows c and r of
// pair p, each score divided by the divisor of its row (at least 1), and a sum over the terms of the link:
//     loss[p] = sum of weight f(chosen * score[c] + rejected * score[r] + shift)
//     total = scale * sum over p of weights[p] loss[p],   slopes[row] = the derivative of total to the score
// A pair whose loss is NaN has NaN slopes. Rows of no pair have slope 0. No row is in two pairs. A row
// outside [0, J) is an error; on CUDA, where an error would mean to wait for the device, total and the
// pair's row of the table are NaN.
//
//     f            value
//     logistic     -log sigmoid(x)
//     square       x^2
//     hinge        max(x, 0)
//     sigmoid      sigmoid(x)
//     entropy      sigmoid(x) (log sigmoid(x) - parameter)
//     blend        k exp(-x) - (1 - k) log sigmoid(x),  k = sigmoid(x / parameter)
//
// table[p] holds in float64 the loss, the scores of chosen and rejected row, the derivatives of the loss to
// both, and the second derivatives: chosen twice, chosen and rejected, rejected twice.
//
//     scores 2 1   one pair 0 1   square, weight 1, chosen 1, rejected -1, shift 1   scale .5
//     loss 4   total 2   slopes 2 -2   table 4 2 1 4 -4 2 -2 2
//
// Must read and write: every array once.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

TOKCREDIT_ENUM(LinkFunction, logistic, square, hinge, sigmoid, entropy, blend)
TOKCREDIT_ENUM(PairColumn, loss, chosen, rejected, of_chosen, of_rejected, chosen_twice, mixed,
               rejected_twice)
constexpr int pair_columns = int(PairColumn::rejected_twice) + 1;

struct LinkTerm {
  LinkFunction function;
  double weight, chosen, rejected, shift, parameter;
};
constexpr int most_link_terms = 4;

struct PairLink {
  Type type;               // f32 or f64, of scores, total and slopes
  const void *scores;      // [J]
  const int64_t *divisors; // [J], or null for 1
  const int64_t *pairs;    // [P, 2], chosen and rejected row, or null for rows 2p and 2p + 1
  const double *weights;   // [P], or null for 1
  int64_t rows;            // J
  int64_t count;           // P
  LinkTerm terms[most_link_terms];
  int32_t term_count;
  double scale;
  void *total;   // one number
  void *slopes;  // [J]
  double *table; // [P, pair_columns]
};

namespace cpu {
void pair_link(const PairLink &);
} // namespace cpu
namespace cuda {
class Queue;
void pair_link(const PairLink &, Queue &);
} // namespace cuda

} // namespace tokcredit
