// Divergence between a student's and a teacher's next-token distribution, row by row of two (rows,
// vocabulary) matrices, and the entropy of the student's.
//
//     p = softmax(student[i] / temperature);   q = softmax(teacher[i] / temperature)
//     m = share * q + (1 - share) * p
//     forward_kl     KL(q || p)                 reverse_kl     KL(p || q)
//     skew_forward   KL(q || m)                 skew_reverse   KL(p || m)
//     js             share * KL(q || m) + (1 - share) * KL(p || m)
//
//     student 0 0 0 log(3)   p 1/6 1/6 1/6 1/2     teacher 0 0 0 0   q 1/4 1/4 1/4 1/4
//     forward_kl 0.1308   reverse_kl 0.1438   js with share 1/2: 0.0338   entropy of p 1.2425
//
// With `other` the teacher is a mixture of two logits with a weight for each row:
//     teacher[i] + weights[i] * (teacher[i] - other[i])
// A logit of -inf in `teacher` stays -inf, and a weight of 0 leaves `other` unread.
//
// The gradient, with g = grad_values[i]: grad[i][j] = g * (derivative of the value by p's logit j) /
// temperature
//     forward_kl     p[j] - q[j]
//     reverse_kl     p[j] * (log p[j] - log q[j] - value)
//     js             (1 - share) * p[j] * (log p[j] - log m[j] - KL(p || m))
//     skew_forward   (1 - share) * p[j] * (sum_k p[k] * q[k] / m[k] - q[j] / m[j])
//     skew_reverse   p[j] * (f[j] - sum_k p[k] * f[k]),   f = log p - log m + share * q / m
// None goes to the teacher.
//
// A logit of -inf has probability 0, and so has one whose probability underflows in the type of the sums.
// Terms of weight 0 are 0: forward_kl is inf where p alone is 0, reverse_kl where q alone is, the others are
// always finite. The gradient of a row whose value is not finite is NaN. A row where the logsumexp of either
// is not finite, of -inf only for one, is NaN in all results.
//
// A row whose mask is false is not read, and its results and its gradient are 0. A row with g = 0 is not read
// by the gradient, which is 0 there.
//
// student, teacher, other and grad have one float type; values, entropies and their gradient are float32, or
// float64 when the logits are; so are weights. `saved` is float64 [rows, 3]: the logsumexp of both, and what
// the row's gradient subtracts. Where a probability is above 1/2, elements are computed in double: what is
// left to 1 keeps its digits. No (rows, vocabulary) temporary; on the CPU a divergence from a mixture keeps
// three numbers for each token of one row, per thread.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

TOKCREDIT_ENUM(Divergence, forward_kl, reverse_kl, js, skew_forward, skew_reverse)

constexpr int64_t saved_of_divergence = 3;

struct DivergenceRows {
  int64_t rows;
  int64_t vocabulary;
  Type type;
  const void *student;
  const void *teacher;
  const void *other;   // null: the teacher is no mixture
  const void *weights; // of `other`
  const bool *mask;    // null: all rows
  Divergence kind;
  double share; // in (0, 1)
  double temperature;
};

struct DivergenceForward {
  DivergenceRows in;
  void *values;
  void *entropies;
  double *saved;
};

// `grad` may be the student's logits themselves.
struct DivergenceBackward {
  DivergenceRows in;
  const double *saved;
  const void *grad_values;
  void *grad;
};

namespace cpu {
void divergence(const DivergenceForward &, int threads);
void divergence_gradient(const DivergenceBackward &, int threads);
} // namespace cpu
namespace cuda {
class Queue;
void divergence(const DivergenceForward &, Queue &);
void divergence_gradient(const DivergenceBackward &, Queue &);
} // namespace cuda

} // namespace tokcredit
