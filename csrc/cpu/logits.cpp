#include "ops/logits.hpp"
#include "cpu/parallel.hpp"
#include "cpu/simd.hpp"
#include "math/dispatch.hpp"
#include "math/exponential.hpp"
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace tokcredit::cpu {
namespace {

// Elements per block: the block's temporaries stay in the first-level cache.
constexpr int64_t block = 1024;

// exp of less is 0 in float; a finite floor keeps 0 * d at 0 where a logit is -inf. Double reaches further.
TOKCREDIT_INLINE float lowest(float) { return -104.0f; }
TOKCREDIT_INLINE double lowest(double) { return -746.0; }

template <class T> TOKCREDIT_INLINE accumulate_t<T> row_max_body(const T *x, int64_t n) {
  using A = accumulate_t<T>;
  // Many more than a vector, or the compiler unrolls the inner loop into scalars.
  constexpr int64_t width = 128;
  A most[width];
  for (int64_t k = 0; k < width; ++k)
    most[k] = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < n; i += width) {
    const int64_t m = std::min(width, n - i);
    for (int64_t k = 0; k < m; ++k) {
      const A v = load(x[i + k]);
      most[k] = most[k] < v ? v : most[k];
    }
  }
  return *std::max_element(most, most + width);
}

// exps = sum exp(d), weighted = sum exp(d) * d, with d = (x - most) * inverse.
template <class T, class A>
TOKCREDIT_INLINE void row_sums_body(const T *x, int64_t n, A most, A inverse, double *exps,
                                    double *weighted) {
  A e[block], w[block];
  double s = 0, u = 0;
  for (int64_t i = 0; i < n; i += block) {
    const int64_t m = std::min(block, n - i);
    for (int64_t k = 0; k < m; ++k) {
      A d = (load(x[i + k]) - most) * inverse;
      d = d < lowest(d) ? lowest(d) : d;
      e[k] = exponential(d);
      w[k] = e[k] * d;
    }
    int64_t width = lanes;
    while (width < m)
      width *= 2;
    for (int64_t k = m; k < width; ++k)
      e[k] = w[k] = 0;
    s += fold(e, width);
    u += fold(w, width);
  }
  *exps = s;
  *weighted = u;
}

// log p = (x - center) * inverse - rest; center and rest are logsumexp in two parts, so that p keeps its
// digits when the logits are large.
template <class A> struct Slope {
  A center, inverse, rest;
  A entropy;
  A from_log_prob, from_entropy; // the gradients of both outputs, divided by the temperature
};

template <class T, class A> TOKCREDIT_INLINE void row_slope_body(const T *x, int64_t n, Slope<A> s, T *grad) {
  for (int64_t i = 0; i < n; i += block) {
    A g[block];
    const int64_t m = std::min(block, n - i);
    for (int64_t k = 0; k < m; ++k) {
      A d = (load(x[i + k]) - s.center) * s.inverse - s.rest;
      d = d < lowest(d) ? lowest(d) : d;
      g[k] = -exponential(d) * (s.from_log_prob + s.from_entropy * (d + s.entropy));
    }
    for (int64_t k = 0; k < m; ++k)
      store(grad + i + k, g[k]);
  }
}

// target_clones needs plain functions.
#define TOKCREDIT_ROW_LOOPS(T, A)                                                                            \
  TOKCREDIT_CLONES A row_max(const T *x, int64_t n) { return row_max_body(x, n); }                           \
  TOKCREDIT_CLONES void row_sums(const T *x, int64_t n, A most, A inverse, double *exps, double *weighted) { \
    row_sums_body(x, n, most, inverse, exps, weighted);                                                      \
  }                                                                                                          \
  TOKCREDIT_CLONES void row_slope(const T *x, int64_t n, const Slope<A> &s, T *grad) {                       \
    row_slope_body(x, n, s, grad);                                                                           \
  }
TOKCREDIT_ROW_LOOPS(float, float)
TOKCREDIT_ROW_LOOPS(bf16, float)
TOKCREDIT_ROW_LOOPS(f16, float)
TOKCREDIT_ROW_LOOPS(double, double)
#undef TOKCREDIT_ROW_LOOPS

int64_t token_of(const Logits &in, int64_t i) {
  return in.token_type == Type::i64 ? static_cast<const int64_t *>(in.tokens)[i]
                                    : static_cast<const int32_t *>(in.tokens)[i];
}

void check_tokens(const Logits &in) {
  for (int64_t i = 0; i < in.rows; ++i) {
    const int64_t token = token_of(in, i);
    if (token < -1 || token >= in.vocabulary)
      throw std::invalid_argument("logits: tokens: expected -1 or an id below the vocabulary of " +
                                  std::to_string(in.vocabulary) + ", got " + std::to_string(token) + " at " +
                                  std::to_string(i));
  }
}

// Chunks of about 64k logits; the body gets each row and its token.
template <class Body> void each_row(const Logits &in, int threads, Body &&body) {
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(in.vocabulary, 1));
  parallel(in.rows, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      body(i, token_of(in, i));
  });
}

} // namespace

void logits(const LogitsForward &f, int threads) {
  check_tokens(f.in);
  with_float(f.in.type, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = accumulate_t<T>;
    const double inverse = 1 / f.in.temperature;
    each_row(f.in, threads, [&](int64_t i, int64_t token) {
      double log_prob = 0, entropy = 0, logsumexp = 0;
      if (token >= 0) {
        const T *x = static_cast<const T *>(f.in.logits) + i * f.in.vocabulary;
        const A most = row_max(x, f.in.vocabulary);
        double s, u;
        row_sums(x, f.in.vocabulary, most, A(inverse), &s, &u);
        const double log_s = std::log(s);
        log_prob = (double(load(x[token])) - double(most)) * inverse - log_s;
        entropy = log_s - u / s;
        logsumexp = double(most) * inverse + log_s;
      }
      static_cast<A *>(f.log_probs)[i] = A(log_prob);
      static_cast<A *>(f.entropies)[i] = A(entropy);
      f.logsumexp[i] = logsumexp;
    });
  });
}

void logits_gradient(const LogitsBackward &b, int threads) {
  check_tokens(b.in);
  with_float(b.in.type, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = accumulate_t<T>;
    const double inverse = 1 / b.in.temperature;
    const A *grad_log_probs = static_cast<const A *>(b.grad_log_probs);
    const A *grad_entropies = static_cast<const A *>(b.grad_entropies);
    each_row(b.in, threads, [&](int64_t i, int64_t token) {
      const T *x = static_cast<const T *>(b.in.logits) + i * b.in.vocabulary;
      T *grad = static_cast<T *>(b.grad) + i * b.in.vocabulary;
      const double from_log_prob = grad_log_probs ? double(grad_log_probs[i]) * inverse : 0;
      const double from_entropy = grad_entropies ? double(grad_entropies[i]) * inverse : 0;
      if (token < 0 || (from_log_prob == 0 && from_entropy == 0)) {
        std::fill(grad, grad + b.in.vocabulary, T{});
        return;
      }
      const double entropy = static_cast<const A *>(b.entropies)[i];
      const A center = A(b.logsumexp[i] * b.in.temperature);
      const A rest = A(b.logsumexp[i] - double(center) * inverse);
      row_slope(x, b.in.vocabulary,
                Slope<A>{center, A(inverse), rest, A(entropy), A(from_log_prob), A(from_entropy)}, grad);
      // The chosen token again, in double: 1 - p keeps its digits when p is close to 1.
      const double log_p = double(load(x[token])) * inverse - b.logsumexp[i];
      const double p = std::exp(log_p);
      const double spread = p > 0 ? p * (log_p + entropy) : p;
      store(grad + token, A(-from_log_prob * std::expm1(log_p) - from_entropy * spread));
    });
  });
}

} // namespace tokcredit::cpu
