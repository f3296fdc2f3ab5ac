// The one operation with a policy gradient: weighted surrogate per row, and its derivative per token, in one
// pass.
//
// For every unmasked token t of row r:
//     difference = log_probs - reference
//     log_ratio = clamp(given log_ratio, or difference,
//                       or the sum over the row's unmasked tokens up to t of difference within [-bound,
//                       bound])
//     width = (number of the row's unmasked tokens up to t) ^ power
//     value, gradient = surrogate(log_ratio, log_probs, advantages, low * width, high * width, cap * width)
//     stats[r] += weights * value, ...;     gradient[t] = weights * gradient
// and gradient is 0 elsewhere. Tokens that do not train (trains false) count in sums and positions and in
// nothing else. The derivative is with respect to the token's own log-prob only, whatever log_ratio was made
// of. Each Operand is one number, one per row, or one per token.
//
//     log_probs -1 -1   reference -1 -1.5   advantages 2 2   low, high = log 0.8, log 1.2   weights 0.5
//     ratio      1  1.65                    value -2 -2.4    gradient -1 0    stats.loss -2.2
//
// stats[r] holds, in float64: loss, tokens, stopped below, stopped above, capped, sum of ratios,
// sum of (ratio - 1 - log_ratio). Sums along a row are kept in double. Time: one read of each operand, one
// write of the gradient.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

enum class Per : int32_t { batch, row, token };

struct Operand {
  const void *data; // null: absent
  Per per;
};

constexpr int loss_stats = 7;

struct PolicyLoss {
  Rows rows;
  const bool *trains;    // [N], or null: every unmasked token
  Type type;             // of log_probs and reference; the operands are its accumulation type
  const void *log_probs; // [N]
  const void *reference; // [N], or null: then log_ratio is given, or is 0
  Operand log_ratio, advantages, weights, low, high, cap;
  int32_t surrogate; // enum Surrogate in math/surrogate.hpp
  bool cumulative;   // log_ratio is the sum along the row; takes reference, and no given log_ratio
  double bound;
  double power;
  double clamp_low, clamp_high;
  double *stats;  // [R, loss_stats]
  void *gradient; // [N] of the accumulation type, or null
};

namespace cpu {
void policy_loss(const PolicyLoss &, int threads);
}
namespace cuda {
class Queue;
void policy_loss(const PolicyLoss &, Queue &);
} // namespace cuda

} // namespace tokcredit
