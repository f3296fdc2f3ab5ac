#include "cpu/logits_rows.hpp"
#include "cpu/blocks.hpp"
#include "math/dispatch.hpp"

namespace tokcredit::cpu {
namespace {

// Calls body(packs, n): the values of a block of n logits.
template <class T, class Body>
void each_block(const T *x, int64_t size, accumulate_t<T> absent, Body &&body) {
  accumulate_t<T> values[block];
  for (int64_t i = 0; i < size; i += block) {
    const int64_t n = size - i < block ? size - i : block;
    read(x + i, n, absent, values);
    body(i, n, values);
  }
}

template <class T> accumulate_t<T> largest(const T *x, int64_t size) {
  using A = accumulate_t<T>;
  Pack<A> most = A(-INFINITY);
  each_block(x, size, A(-INFINITY), [&](int64_t, int64_t n, const A *values) {
    for (int64_t k = 0; k < n; k += lanes) {
      const Pack<A> v(values + k);
      most = choose(most < v, v, most);
    }
  });
  return largest_lane(most);
}

// exps = sum exp(d), weighted = sum exp(d) * d, with d = (x - most) * inverse.
template <class T, class A>
void sums(const T *x, int64_t size, A most, A inverse, double &exps, double &weighted) {
  double e[lanes] = {}, w[lanes] = {};
  each_block(x, size, A(-INFINITY), [&](int64_t, int64_t n, const A *values) {
    Pack<A> own{}, times{};
    for (int64_t k = 0; k < n; k += lanes) {
      Pack<A> d = (Pack<A>(values + k) - most) * inverse;
      d = choose(d < lowest<A>, Pack<A>(lowest<A>), d);
      const Pack<A> p = exponential(d);
      own = own + p;
      times = times + p * d;
    }
    own.add_to(e);
    times.add_to(w);
  });
  exps = weighted = 0;
  for (int64_t k = 0; k < lanes; ++k) {
    exps += e[k];
    weighted += w[k];
  }
}

// log p = (x - center) * inverse - rest; center and rest are logsumexp in two parts, so that p keeps its
// digits when the logits are large.
template <class A> struct Slope {
  A center, inverse, rest;
  A entropy;
  A from_log_prob, from_entropy; // the gradients of both outputs, divided by the temperature
};

template <class T, class A> void slope(const T *x, int64_t size, const Slope<A> &s, T *grad) {
  each_block(x, size, A(0), [&](int64_t i, int64_t n, A *values) {
    for (int64_t k = 0; k < n; k += lanes) {
      Pack<A> d = (Pack<A>(values + k) - s.center) * s.inverse - s.rest;
      d = choose(d < lowest<A>, Pack<A>(lowest<A>), d);
      const Pack<A> g = -exponential(d) * (s.from_log_prob + s.from_entropy * (d + s.entropy));
      g.store(values + k, lanes);
    }
    for (int64_t k = 0; k < n; ++k)
      store(grad + i + k, values[k]);
  });
}

int64_t token_of(const Logits &in, int64_t i) {
  return in.token_type == Type::i64 ? static_cast<const int64_t *>(in.tokens)[i]
                                    : static_cast<const int32_t *>(in.tokens)[i];
}

template <class T> void forward(const LogitsForward &f, int64_t i) {
  using A = accumulate_t<T>;
  const double inverse = 1 / f.in.temperature;
  const int64_t token = token_of(f.in, i);
  double log_prob = 0, entropy = 0, logsumexp = 0;
  if (token >= 0) {
    const T *x = static_cast<const T *>(f.in.logits) + i * f.in.vocabulary;
    const A most = largest(x, f.in.vocabulary);
    double s, u;
    sums(x, f.in.vocabulary, most, A(inverse), s, u);
    const double log_s = std::log(s);
    log_prob = (double(load(x[token])) - double(most)) * inverse - log_s;
    entropy = log_s - u / s;
    logsumexp = double(most) * inverse + log_s;
  }
  static_cast<A *>(f.log_probs)[i] = A(log_prob);
  static_cast<A *>(f.entropies)[i] = A(entropy);
  f.logsumexp[i] = logsumexp;
}

template <class T> void backward(const LogitsBackward &b, int64_t i) {
  using A = accumulate_t<T>;
  const double inverse = 1 / b.in.temperature;
  const auto given = [&](const void *gradient) {
    return gradient ? double(static_cast<const A *>(gradient)[i]) * inverse : 0.0;
  };
  const double from_log_prob = given(b.grad_log_probs), from_entropy = given(b.grad_entropies);
  const T *x = static_cast<const T *>(b.in.logits) + i * b.in.vocabulary;
  T *grad = static_cast<T *>(b.grad) + i * b.in.vocabulary;
  const int64_t token = token_of(b.in, i);
  if (token < 0 || (from_log_prob == 0 && from_entropy == 0)) {
    __builtin_memset(grad, 0, b.in.vocabulary * sizeof(T));
    return;
  }
  const double entropy = static_cast<const A *>(b.entropies)[i], own = double(load(x[token]));
  const A center = A(b.logsumexp[i] * b.in.temperature);
  const A rest = A(b.logsumexp[i] - double(center) * inverse);
  slope(x, b.in.vocabulary, Slope<A>{center, A(inverse), rest, A(entropy), A(from_log_prob), A(from_entropy)},
        grad);
  // The chosen token again, in double: 1 - p keeps its digits when p is close to 1.
  const double log_p = own * inverse - b.logsumexp[i];
  const double p = std::exp(log_p);
  const double spread = p > 0 ? p * (log_p + entropy) : p;
  store(grad + token, A(-from_log_prob * std::expm1(log_p) - from_entropy * spread));
}

} // namespace

namespace TOKCREDIT_LEVEL {

void logits_rows(const LogitsForward &f, int64_t first, int64_t last) {
  with_float(f.in.type, [&](auto t) {
    for (int64_t i = first; i < last; ++i)
      forward<typename decltype(t)::type>(f, i);
  });
}

void logits_gradient_rows(const LogitsBackward &b, int64_t first, int64_t last) {
  with_float(b.in.type, [&](auto t) {
    for (int64_t i = first; i < last; ++i)
      backward<typename decltype(t)::type>(b, i);
  });
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
