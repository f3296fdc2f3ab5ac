// Divergence between a student's next-token distribution and a teacher's of which some ids and their
// log-probs are known, row by row, and the entropy of the student's. Kinds and `share` are those of
// ops/divergence.hpp.
//
//     p = softmax(student[i] / temperature);   q[a] = exp(log_probs[i][a]) of id ids[i][a]
//     bucket         the distributions over the ids and one more outcome, which is all other ids:
//                    1 - sum p of the ids, and 1 - sum q, the latter at least 1e-7
//     renormalised   both over the ids alone, each divided by its sum there
//     cut            the ids' terms of the sum over the vocabulary; KL divergences only, and may be negative
//
//     student 0 0 0 log(3)   p 1/6 1/6 1/6 1/2     ids 3 0   q 1/2 1/4   forward_kl
//     bucket        over 1/2 1/6 1/3 and 1/2 1/4 1/4: 1/4 * log(3/2) + 1/4 * log(3/4) = 0.0294
//     renormalised  over 3/4 1/4 and 2/3 1/3: 0.0174
//     cut           1/4 * log(3/2) = 0.1014
//
// An id of -1 is none, and of equal ids the first counts. Any other id outside [0, vocabulary) is an error;
// on CUDA its row is NaN. Where the student's mass on all other ids is 0, so is the teacher's that is at most
// 1e-7.
//
// `slopes` [rows, top] is the derivative of the value by the logit of each id (times temperature), and
// `saved` [rows, 2] the student's logsumexp and what multiplies p for that of any other id: the gradient is
//     grad[i][j] = grad_values[i] / temperature * (slopes[i][a] where j is ids[i][a], else saved[i][1] *
//     p[j])
// Rows whose value is not finite, masked rows and rows without gradient are as in ops/divergence.hpp, and so
// are types; ids are int32 or int64, log_probs of the type of values, slopes and saved float64.
#pragma once
#include "ops/divergence.hpp"

namespace tokcredit {

TOKCREDIT_ENUM(Outside, bucket, renormalised, cut)

constexpr int64_t most_top = 1024; // ids of a row

struct TopRows {
  int64_t rows;
  int64_t vocabulary;
  int64_t top;
  Type type;
  Type id_type;
  const void *student;
  const void *ids;
  const bool *mask; // null: all rows
  double temperature;
};

struct DivergenceTopForward {
  TopRows in;
  const void *log_probs;
  Divergence kind;
  double share;
  Outside outside;
  void *values;
  void *entropies;
  double *saved;
  double *slopes;
};

// `grad` may be the student's logits themselves.
struct DivergenceTopBackward {
  TopRows in;
  const double *saved;
  const double *slopes;
  const void *grad_values;
  void *grad;
};

namespace cpu {
void divergence_top(const DivergenceTopForward &, int threads);
void divergence_top_gradient(const DivergenceTopBackward &, int threads);
} // namespace cpu
namespace cuda {
void divergence_top(const DivergenceTopForward &, Queue &);
void divergence_top_gradient(const DivergenceTopBackward &, Queue &);
} // namespace cuda

} // namespace tokcredit
