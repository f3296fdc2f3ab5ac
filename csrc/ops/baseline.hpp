// Reward-to-go, less what the rows of a group have of it on average at the same offset, weighted by energy.
//
// With j = t - begin[r] the offset of a token in its row, over unmasked tokens only:
//     G[t] = sum of rewards over the row from t on               (rewards per row: that number at every
//     token) W[t] = sum over the row up to t of 1 - 2 exp(log_probs) + squares baseline[g][j] = sum of W G /
//     (sum of W + epsilon) over the rows of group g at offset j;
//                      0 where fewer than two rows have a token there
//     advantages[t] = G[t] - baseline[g][j];     returns[t] = G[t]
// and both are 0 where masked. W is what the squared score of the logits adds up to, so the baseline is the
// one of least variance. Sums are float64, over rows in their order.
//
//     two rows of a group   log_probs -inf   squares 1   rewards 0 1 and 0 3
//     W 2 4                 G 1 1 and 3 3    baseline 2 2   advantages -1 -1 and 1 1
//
// Time: one read of each argument, one write of each result.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

struct Baseline {
  Rows rows;
  Type type;            // of log_probs, squares and rewards
  const int64_t *group; // [R], in [0, groups)
  int64_t groups;
  const void *log_probs; // [N]
  const void *squares;   // [N], sum over the vocabulary of squared probabilities
  const void *rewards;   // [N], or [R] with `per_row`
  bool per_row;
  double epsilon;
  void *advantages; // [N] of the accumulation type
  void *returns;    // the same, or null
};

namespace cpu {
void baseline(const Baseline &, int threads);
}
namespace cuda {
class Queue;
void baseline(const Baseline &, Queue &);
} // namespace cuda

} // namespace tokcredit
