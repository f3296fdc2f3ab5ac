// Reward-to-go, less what the rows of a group have of it on average at the same offset, weighted by energy.
//
// j = t - begin[r] is the offset of a token in its row, masked tokens counted; sums are over unmasked tokens:
//     G[t] = sum of the row's rewards from t on; with one reward per row, that number
//     W[t] = sum over the row up to t of max(0, 1 - 2 exp(log_probs) + squares)
//     baseline[g][j] = sum of W G / (sum of W + epsilon), over the rows of group g that have a token at j;
//                      0 where fewer than two have one
//     advantages[t] = G[t] - baseline[g][j];   returns[t] = G[t]
// Both results are 0 where masked. W adds up the squared length of the score in the logits, so this baseline
// is the one of least variance. Sums are float64, those over rows in the order of the rows.
//
//     two rows of a group   log_probs -inf -inf   squares 1 1   rewards 0 1 and 0 3
//     W 2 4 in both         G 1 1 and 3 3         baseline 2 2  advantages -1 -1 and 1 1
//
// Time: one read of log_probs and squares, two of rewards and mask, one write of each result.
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
