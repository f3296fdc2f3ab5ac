// Masked linear recurrence along rows.
//
// Walking a row forward (or backward when `reverse`), over its unmasked tokens only:
//     state = decay * state + x[t];   y[t] = state          (inclusive)
//     y[t] = state;   state = decay * state + x[t]          (exclusive)
// starting from carry_in[row] (0 when null) and leaving the last state in carry_out[row]. Masked tokens are
// stepped over: they neither decay nor reset the state, and y is 0 there and on padding.
//
//     x     1  2  3  4      mask  1 1 0 1      decay 0.5
//     y     1  2.5  0  5.25                    carry_out 5.25
//
// A row has a decay of its own where `decays` has one for each.
//
// x is any float type; y and both carries are float32, or float64 when x is. Time: one read, one write.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

struct Scan {
  Rows rows;
  Type type;
  const void *x;
  const void *carry_in;
  void *y;
  void *carry_out;
  double decay;
  bool reverse;
  bool exclusive;
  const double *decays = nullptr; // [R], or null for `decay` in all rows
};

namespace cpu {
void scan(const Scan &, int threads);
}
namespace cuda {
class Queue;
void scan(const Scan &, Queue &);
} // namespace cuda

} // namespace tokcredit
