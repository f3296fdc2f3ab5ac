// Log-probability of one token and entropy of the distribution, row by row of a (rows, vocabulary) matrix.
//
//     z = logits[i] / temperature;   p = softmax(z)
//     logsumexp[i] = log sum_j exp(z[j])
//     log_probs[i] = z[tokens[i]] - logsumexp[i]
//     entropies[i] = -sum_j p[j] log p[j]                 (nats; a logit of -inf adds 0)
//
//     logits  0 0 0 log(3)     token 3, temperature 1
//     p       1/6 1/6 1/6 1/2
//     log_probs -0.6931   entropies 1.2425   logsumexp 1.7918
//
// A token of -1 marks a row that takes no part: it is not read, its outputs and its gradient are 0. Any other
// token outside [0, vocabulary) is an error; on CUDA, where an error would mean to wait for the device, its
// row is NaN.
//
// The gradient, with a = grad_log_probs[i], h = grad_entropies[i] (null for 0), H = entropies[i]:
//     grad[i][j] = (a * (1[j == token] - p[j]) - h * p[j] * (log p[j] + H)) / temperature
// A row with a = h = 0 is not read either, so NaN in a row that the loss masks stays there.
//
// logits and grad are any float type; log_probs, entropies and their gradients are float32, or float64 when
// logits is; logsumexp is float64 always: with logits of 1e4 a float32 one would cost three digits of p.
// tokens are int32 or int64. No (rows, vocabulary) temporary. Forward: logits are read once, or a
// second time from cache; backward: one read, one write.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

struct Logits {
  int64_t rows;
  int64_t vocabulary;
  Type type;
  Type token_type;
  const void *logits;
  const void *tokens;
  double temperature;
};

struct LogitsForward {
  Logits in;
  void *log_probs;
  void *entropies;
  double *logsumexp;
};

// `grad` may be the logits themselves.
struct LogitsBackward {
  Logits in;
  const double *logsumexp;
  const void *entropies;
  const void *grad_log_probs;
  const void *grad_entropies;
  void *grad;
};

namespace cpu {
void logits(const LogitsForward &, int threads);
void logits_gradient(const LogitsBackward &, int threads);
} // namespace cpu
namespace cuda {
class Queue;
void logits(const LogitsForward &, Queue &);
void logits_gradient(const LogitsBackward &, Queue &);
} // namespace cuda

} // namespace tokcredit
