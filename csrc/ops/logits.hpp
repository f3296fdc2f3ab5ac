// Log-probabilities and entropies of distributions, row by row of a (rows, vocabulary) matrix of logits.
//
//     x = scale * logits[i]
//     z = softcap * tanh(x / softcap) / temperature[i]    (x / temperature[i] without softcap)
//     p = softmax(z);   logsumexp[i] = log sum_j exp(z[j])
//     log_probs[i] = z[tokens[i]] - logsumexp[i]
//     entropies[i] = -sum_j p[j] log p[j]                 (nats; a logit of -inf adds 0)
//     squares[i] = sum_j p[j]^2
//     chosen_log_probs[i][k] = z[chosen[i][k]] - logsumexp[i]
//
//     logits  0 0 0 log(3)     token 3, temperature 1, chosen 0 -1
//     p       1/6 1/6 1/6 1/2
//     log_probs -0.6931   entropies 1.2425   squares 1/3   chosen_log_probs -1.7918 0   logsumexp 1.7918
//
// A token of -1 marks a row that takes no part: it is not read, its outputs and its gradient are 0. A chosen
// id of -1 stands for none: its output is 0. Any other id outside [0, ids) is an error; on CUDA, where an
// error would mean to wait for the device, its row is NaN. A softcap leaves a logit of -inf as it is. It is
// infinity for none, or from least_softcap to most_softcap, where float32 holds all numbers that it leads to.
//
// The gradient, with a, h, q and c[k] = grad_log_probs[i], grad_entropies[i], grad_squares[i] and
// grad_chosen[i][k] (null for 0), H = entropies[i], S = squares[i] and s[j] = 1 - tanh(x[j] / softcap)^2:
//     g[j] = a * (1[j == token] - p[j]) - h * p[j] * (log p[j] + H) + 2 q * p[j] * (p[j] - S)
//            + sum_k c[k] * (1[j == chosen[k]] - p[j])
//     grad[i][j] = g[j] * s[j] * scale / temperature[i]
// A row whose incoming gradients are 0 is not read either, so NaN in a row that the loss masks stays there.
//
// The columns may be a part of the vocabulary: column j is the id first + j of `ids`. Parts are put together
// by their states, of 5 numbers and one for each chosen id, in double:
//     m = max z,  s = sum e^(z-m),  u = sum e^(z-m) (z-m),  r = sum e^(2 (z-m)),  own = z[token] or 0
//     elsewhere
// The state of several parts: M = max m, f = e^(m-M) for each part, and the sums of f s, of f (u + (m-M) s),
// of f^2 r, and of own. Then logsumexp = M + log s, entropies = log s - u / s, squares = r / s^2. The
// gradient of a part takes those of the whole.
//
// logits are any float type; log_probs, entropies, squares, chosen_log_probs, temperatures and the gradients
// of outputs are float32, or float64 when logits is; logsumexp is float64 always: with logits of 1e4 a
// float32 one would cost three digits of p. grad is of the logits' type, or of half precision for float32
// logits. tokens are int32 or int64. No (rows, vocabulary) temporary. Forward: logits are read once;
// backward: one read, one write.
#pragma once
#include "ops/array.hpp"
#include "ops/places.hpp"

namespace tokcredit {

constexpr double least_softcap(double scale) { return 1e-20 * (scale > 1 ? scale : 1); }
constexpr double most_softcap(double scale) { return 1e20 * (scale < 1 ? scale : 1); }

struct Logits {
  int64_t rows;
  int64_t vocabulary; // columns
  Places places;
  Type type;
  Type token_type;
  const void *logits;
  const void *tokens;
  double temperature;
  const void *temperatures; // of each row, instead, or null
  double scale;
  double softcap;        // infinity without
  const int64_t *chosen; // [rows, choices], or null
  int64_t choices;
  int64_t first;
  int64_t ids;
};

// squares and chosen_log_probs may be null.
struct LogitsForward {
  Logits in;
  void *log_probs;
  void *entropies;
  void *squares;
  void *chosen_log_probs;
  double *logsumexp;
};

// [rows, 5 + choices]: the state of the columns with that of the parts before, which may be null for none or
// the same memory. The state of no part, or of a row that takes no part, is -inf and then 0.
struct LogitsState {
  Logits in;
  const double *before;
  double *state;
};
constexpr int64_t numbers_of_state = 5;

// squares are read with grad_squares only. `grad` may begin at the logits' memory, with rows that begin where
// theirs do: of another type too.
struct LogitsBackward {
  Logits in;
  const double *logsumexp;
  const void *entropies;
  const void *squares;
  const void *grad_log_probs;
  const void *grad_entropies;
  const void *grad_squares;
  const void *grad_chosen;
  Type grad_type;
  Places grad_places;
  void *grad;
};

namespace cpu {
void logits(const LogitsForward &, int threads);
void logits_state(const LogitsState &, int threads);
void logits_gradient(const LogitsBackward &, int threads);
} // namespace cpu
namespace cuda {
class Queue;
void logits(const LogitsForward &, Queue &);
void logits_state(const LogitsState &, Queue &);
void logits_gradient(const LogitsBackward &, Queue &);
} // namespace cuda

} // namespace tokcredit
