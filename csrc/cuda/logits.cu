// A block per row of logits, 16 bytes per load. Forward reads a row once: every thread keeps the maximum of
// what it has seen and the sums relative to it (online softmax), and the block merges them. Backward reads
// once and writes once.
#include "cuda/powers.cuh"
#include "cuda/vector.cuh"
#include "math/dispatch.hpp"
#include "ops/logits.hpp"
#include <cub/block/block_reduce.cuh>

namespace tokcredit::cuda {
namespace {

// Sums of 2^d and of d * 2^d, d = (x - most) * scale being at most 0. The first leaves out one logit that is
// the largest: where p is close to 1, the sum of the others keeps digits that 1 + others would lose.
template <class A> struct Sums {
  A most;
  double others = -1, weighted = 0; // -1: no logit yet

  __device__ void raise(A to, A scale) {
    const double d = double(floored((most - to) * scale)), factor = double(power_of_two(A(d)));
    weighted = factor * (weighted + d * (1 + others));
    others = factor * (1 + others);
    most = to;
  }

  // Several logits at once: one change of the maximum, sums in A, then in double.
  template <int width> __device__ void add(const A (&x)[width], A scale) {
    A top = x[0];
#pragma unroll
    for (int k = 1; k < width; ++k)
      top = larger(top, x[k]);
    if (top > most) {
      raise(top, scale);
      sum<true>(x, scale);
    } else {
      sum<false>(x, scale);
    }
  }

private:
  template <bool raised, int width> __device__ void sum(const A (&x)[width], A scale) {
    A p = 0, w = 0;
    bool left_out = !raised;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const A d = (x[k] - most) * scale, e = power_of_two(d);
      w += e * floored(d);
      const bool leave = !left_out && d == 0; // never for inf - inf
      left_out |= leave;
      p += leave ? A(0) : e;
    }
    others += double(p);
    weighted += double(w);
  }
};

template <class A> struct Merge {
  A scale;
  __device__ Sums<A> operator()(Sums<A> a, Sums<A> b) const {
    if (a.most < b.most)
      a.raise(b.most, scale);
    else
      b.raise(a.most, scale);
    a.others += b.others;
    a.weighted += b.weighted;
    return a;
  }
};

__device__ int64_t token_of(const Logits &in, int64_t i) {
  return in.token_type == Type::i64 ? static_cast<const int64_t *>(in.tokens)[i]
                                    : int64_t(static_cast<const int32_t *>(in.tokens)[i]);
}

template <class T, class A, int width>
__device__ void numbers(const Vector<T> &v, A (&x)[width], int from = 0) {
#pragma unroll
  for (int k = 0; k < Vector<T>::width; ++k)
    x[from + k] = load(v.item[k]);
}

template <class T, int threads> __global__ void __launch_bounds__(threads) forward(LogitsForward f) {
  using A = accumulate_t<T>;
  using Reduce = cub::BlockReduce<Sums<A>, threads>;
  __shared__ typename Reduce::TempStorage scratch;
  constexpr int width = Vector<T>::width;
  const A scale = A(log2_e / f.in.temperature);
  const int64_t i = blockIdx.x;
  const T *x = static_cast<const T *>(f.in.logits) + i * f.in.vocabulary;
  const int64_t token = token_of(f.in, i);
  const bool valid = token >= 0 && token < f.in.vocabulary;
  Sums<A> own{lowest(A())};
  if (valid) {
    const Vectors<T> vectors(x, f.in.vocabulary);
    vectors.each_single([&](int j) {
      const A one[1] = {load(x[j])};
      own.add(one, scale);
    });
    vectors.each_vector(
        [&](int j, int k) {
          const Vector<T> first = load_vector(x + j), second = load_vector(x + k);
          A both[2 * width];
          numbers(first, both);
          numbers(second, both, width);
          own.add(both, scale);
        },
        [&](int j) {
          A one[width];
          numbers(load_vector(x + j), one);
          own.add(one, scale);
        });
  }
  const Sums<A> all = Reduce(scratch).Reduce(own, Merge<A>{scale});
  if (threadIdx.x != 0)
    return;
  // To raise an error for an id outside the vocabulary would mean to wait for the device: its row is NaN.
  double log_prob = token == -1 ? 0 : double(NAN), entropy = log_prob, logsumexp = log_prob;
  if (valid && all.others != -1) { // -1: every logit is -inf
    const double inverse = 1 / f.in.temperature, log_sum = log1p(all.others);
    log_prob = (double(load(x[token])) - double(all.most)) * inverse - log_sum;
    entropy = log_sum - all.weighted / (1 + all.others) * ln_2;
    logsumexp = double(all.most) * inverse + log_sum;
  }
  static_cast<A *>(f.log_probs)[i] = A(log_prob);
  static_cast<A *>(f.entropies)[i] = A(entropy);
  f.logsumexp[i] = logsumexp;
}

// The gradient of a row with respect to one logit. Coefficients are divided by the temperature.
template <class A> struct Slope {
  // log2 p = (x - center) * scale - rest; center and rest are logsumexp in two parts, so that p keeps its
  // digits when the logits are large.
  A center, scale, rest;
  A constant, times_log_p; // -p * (constant + times_log_p * log2 p)

  __device__ A operator()(A logit) const {
    const A d = (logit - center) * scale - rest;
    return -power_of_two(d) * (constant + times_log_p * floored(d));
  }
};

// The same for the row's token, in double: 1 - p keeps its digits when p is close to 1. One thread of a block
// calls it.
__noinline__ __device__ double slope_of_token(double log_p, double entropy, double from_log_prob,
                                              double from_entropy) {
  const double p = exp(log_p);
  return -from_log_prob * expm1(log_p) - from_entropy * (p > 0 ? p * (log_p + entropy) : p);
}

template <class T, int threads>
__global__ void __launch_bounds__(threads, sizeof(T) == 8 ? 1 : 0) backward(LogitsBackward b) {
  using A = accumulate_t<T>;
  constexpr int width = Vector<T>::width;
  const int64_t i = blockIdx.x, vocabulary = b.in.vocabulary;
  const double inverse = 1 / b.in.temperature;
  const A *grad_log_probs = static_cast<const A *>(b.grad_log_probs);
  const A *grad_entropies = static_cast<const A *>(b.grad_entropies);
  const T *x = static_cast<const T *>(b.in.logits) + i * vocabulary;
  T *grad = static_cast<T *>(b.grad) + i * vocabulary;
  const int64_t token = token_of(b.in, i);
  const double from_log_prob = grad_log_probs ? double(grad_log_probs[i]) * inverse : 0;
  const double from_entropy = grad_entropies ? double(grad_entropies[i]) * inverse : 0;
  if (token == -1 || (from_log_prob == 0 && from_entropy == 0)) {
    const auto clear = [&](int j) { store_vector(grad + j, Vector<T>{}); };
    const Vectors<T> vectors(grad, vocabulary);
    vectors.each_single([&](int j) { grad[j] = T{}; });
    vectors.each_vector(
        [&](int j, int k) {
          clear(j);
          clear(k);
        },
        clear);
    return;
  }
  const double entropy = static_cast<const A *>(b.entropies)[i], logsumexp = b.logsumexp[i];
  const A center = A(logsumexp * b.in.temperature);
  const double rest = (logsumexp - double(center) * inverse) * log2_e;
  const bool valid = token >= 0 && token < vocabulary;
  const double none = valid ? 0 : double(NAN);
  const Slope<A> slope{center, A(log2_e * inverse), A(rest), A(from_log_prob + from_entropy * entropy + none),
                       A(from_entropy * ln_2)};
  const auto of_token = [&](A logit) {
    return A(slope_of_token(double(logit) * inverse - logsumexp, entropy, from_log_prob, from_entropy));
  };
  const int chosen = valid ? int(token) : -1;
  const auto put = [&](int j, const Vector<T> &v) {
    A out[width];
    numbers(v, out);
#pragma unroll
    for (int k = 0; k < width; ++k)
      out[k] = slope(out[k]);
    if (unsigned(chosen - j) < unsigned(width)) { // no other thread reads or writes this logit
      const A instead = of_token(load(x[chosen]));
#pragma unroll
      for (int k = 0; k < width; ++k)
        out[k] = j + k == chosen ? instead : out[k];
    }
    Vector<T> stored;
#pragma unroll
    for (int k = 0; k < width; ++k)
      store(stored.item + k, out[k]);
    store_vector(grad + j, stored);
  };
  // Pairs of vectors that start at the same place inside 16 bytes.
  const bool whole = (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(grad)) % 16 == 0;
  const Vectors<T> vectors(x, vocabulary, whole);
  vectors.each_single([&](int j) {
    const A logit = load(x[j]);
    store(grad + j, j == chosen ? of_token(logit) : slope(logit));
  });
  vectors.each_vector(
      [&](int j, int k) {
        const Vector<T> first = load_vector(x + j), second = load_vector(x + k);
        put(j, first);
        put(k, second);
      },
      [&](int j) { put(j, load_vector(x + j)); });
}

// Calls body with the threads of a block, so that each has a few vectors of a row.
template <class T, class Body> void with_threads(const Logits &in, Body &&body) {
  if (in.vocabulary >= int64_t(1) << 31)
    throw std::invalid_argument("logits: vocabulary: expected fewer than 2^31, got " +
                                std::to_string(in.vocabulary));
  const int64_t vectors = in.vocabulary * int64_t(sizeof(T)) / 16;
  if (vectors > 2048)
    body(std::integral_constant<int, 512>{});
  else if (vectors > 256)
    body(std::integral_constant<int, 128>{});
  else
    body(std::integral_constant<int, 32>{});
}

} // namespace

void logits(const LogitsForward &f, Queue &queue) {
  with_float(f.in.type, [&](auto t) {
    using T = typename decltype(t)::type;
    with_threads<T>(f.in, [&](auto threads) {
      launch("logits", queue, forward<T, decltype(threads)::value>, f.in.rows, threads, f);
    });
  });
}

void logits_gradient(const LogitsBackward &b, Queue &queue) {
  with_float(b.in.type, [&](auto t) {
    using T = typename decltype(t)::type;
    with_threads<T>(b.in, [&](auto threads) {
      launch("logits", queue, backward<T, decltype(threads)::value>, b.in.rows, threads, b);
    });
  });
}

} // namespace tokcredit::cuda
