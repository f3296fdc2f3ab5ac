// A block per row of logits, 16 bytes per load. Forward reads a row once: every thread keeps the maximum of
// what it has seen and the sums relative to it (online softmax), and the block merges them. Backward reads
// once and writes once.
#include "cuda/launch.cuh"
#include "math/dispatch.hpp"
#include "ops/logits.hpp"
#include <cub/block/block_reduce.cuh>

namespace tokcredit::cuda {
namespace {

// 2^x by the hardware, within 2 ulp; double by the library.
__device__ float power_of_two(float x) { return exp2f(x); }
__device__ double power_of_two(double x) { return exp2(x); }

// 2 to less is 0. A finite floor keeps 0 * x at 0 where a logit is -inf; NaN passes.
__device__ float floored(float x) { return x < -150.0f ? -150.0f : x; }
__device__ double floored(double x) { return x < -1080.0 ? -1080.0 : x; }

__device__ float lowest(float) { return -3.402823466e38f; }
__device__ double lowest(double) { return -1.7976931348623157e308; }

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

// Sums of 2^d and of d * 2^d, d = (x - most) * scale being at most 0.
template <class A> struct Sums {
  A most;
  double powers = 0, weighted = 0;

  __device__ void raise(A to, A scale) {
    const double d = double(floored((most - to) * scale));
    const double factor = double(power_of_two(A(d)));
    weighted = factor * (weighted + d * powers);
    powers *= factor;
    most = to;
  }

  // Up to `width` logits at once: one change of the maximum, sums in A, then in double.
  template <int width> __device__ void add(const A (&x)[width], A scale) {
    A top = most;
#pragma unroll
    for (int k = 0; k < width; ++k)
      top = top < x[k] ? x[k] : top;
    if (top > most)
      raise(top, scale);
    A p = 0, w = 0;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const A d = floored((x[k] - most) * scale), e = power_of_two(d);
      p += e;
      w += e * d;
    }
    powers += double(p);
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
    a.powers += b.powers;
    a.weighted += b.weighted;
    return a;
  }
};

// Calls some(i) for single elements and many(i) for each run of `width` whose address is a multiple of 16.
template <int width, class T, class Some, class Many>
__device__ void each_vector(const T *x, int64_t n, bool whole, Some &&some, Many &&many) {
  const int64_t misplaced = int64_t(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int64_t head = whole ? min(n, (width - misplaced) % width) : n, runs = (n - head) / width;
  for (int64_t i = threadIdx.x; i < head; i += blockDim.x)
    some(i);
  for (int64_t v = threadIdx.x; v < runs; v += blockDim.x)
    many(head + v * width);
  for (int64_t i = head + runs * width + threadIdx.x; i < n; i += blockDim.x)
    some(i);
}

template <class T> struct alignas(16) Vector {
  static constexpr int width = 16 / sizeof(T);
  T item[width];
};

__device__ int64_t token_of(const Logits &in, int64_t i) {
  return in.token_type == Type::i64 ? static_cast<const int64_t *>(in.tokens)[i]
                                    : int64_t(static_cast<const int32_t *>(in.tokens)[i]);
}

template <class T, int threads> __global__ void __launch_bounds__(threads) forward(LogitsForward f) {
  using A = accumulate_t<T>;
  using Reduce = cub::BlockReduce<Sums<A>, threads>;
  __shared__ typename Reduce::TempStorage scratch;
  constexpr int width = Vector<T>::width;
  const A scale = A(log2_e / f.in.temperature);
  for (int64_t i = blockIdx.x; i < f.in.rows; i += gridDim.x) {
    const T *x = static_cast<const T *>(f.in.logits) + i * f.in.vocabulary;
    const int64_t token = token_of(f.in, i);
    const bool valid = token >= 0 && token < f.in.vocabulary;
    Sums<A> own{lowest(A())};
    if (valid)
      each_vector<width>(
          x, f.in.vocabulary, true,
          [&](int64_t j) {
            const A one[1] = {load(x[j])};
            own.add(one, scale);
          },
          [&](int64_t j) {
            const Vector<T> v = *reinterpret_cast<const Vector<T> *>(x + j);
            A many[width];
#pragma unroll
            for (int k = 0; k < width; ++k)
              many[k] = load(v.item[k]);
            own.add(many, scale);
          });
    const Sums<A> all = Reduce(scratch).Reduce(own, Merge<A>{scale});
    __syncthreads(); // the next row uses the same scratch
    if (threadIdx.x != 0)
      continue;
    // To raise an error for an id outside the vocabulary would mean to wait for the device: its row is NaN.
    double log_prob = token == -1 ? 0 : double(NAN), entropy = log_prob, logsumexp = log_prob;
    if (valid && all.powers != 0) { // 0: every logit is -inf
      const double inverse = 1 / f.in.temperature, log_sum = log(all.powers);
      log_prob = (double(load(x[token])) - double(all.most)) * inverse - log_sum;
      entropy = log_sum - all.weighted / all.powers * ln_2;
      logsumexp = double(all.most) * inverse + log_sum;
    }
    static_cast<A *>(f.log_probs)[i] = A(log_prob);
    static_cast<A *>(f.entropies)[i] = A(entropy);
    f.logsumexp[i] = logsumexp;
  }
}

template <class T, int threads> __global__ void __launch_bounds__(threads) backward(LogitsBackward b) {
  using A = accumulate_t<T>;
  constexpr int width = Vector<T>::width;
  const int64_t vocabulary = b.in.vocabulary;
  const double inverse = 1 / b.in.temperature;
  const A scale = A(log2_e * inverse);
  const A *grad_log_probs = static_cast<const A *>(b.grad_log_probs);
  const A *grad_entropies = static_cast<const A *>(b.grad_entropies);
  for (int64_t i = blockIdx.x; i < b.in.rows; i += gridDim.x) {
    const T *x = static_cast<const T *>(b.in.logits) + i * vocabulary;
    T *grad = static_cast<T *>(b.grad) + i * vocabulary;
    const int64_t token = token_of(b.in, i);
    const double from_log_prob = grad_log_probs ? double(grad_log_probs[i]) * inverse : 0;
    const double from_entropy = grad_entropies ? double(grad_entropies[i]) * inverse : 0;
    // Pairs of vectors that start at the same place inside 16 bytes.
    const bool whole = (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(grad)) % 16 == 0;
    if (token == -1 || (from_log_prob == 0 && from_entropy == 0)) {
      each_vector<width>(
          grad, vocabulary, true, [&](int64_t j) { grad[j] = T{}; },
          [&](int64_t j) { *reinterpret_cast<Vector<T> *>(grad + j) = Vector<T>{}; });
      continue;
    }
    // log2 p = (x - center) * scale - rest; center and rest are logsumexp in two parts, so that p keeps its
    // digits when the logits are large.
    const double entropy = static_cast<const A *>(b.entropies)[i];
    const A center = A(b.logsumexp[i] * b.in.temperature);
    const A rest = A((b.logsumexp[i] - double(center) * inverse) * log2_e);
    const A ln2 = A(ln_2), h = A(entropy), a = A(from_log_prob), e = A(from_entropy);
    const auto slope = [&](A logit) {
      const A d = floored((logit - center) * scale - rest);
      return -power_of_two(d) * (a + e * (d * ln2 + h));
    };
    // The chosen token in double: 1 - p keeps its digits when p is close to 1.
    double chosen = double(NAN);
    if (token >= 0 && token < vocabulary) {
      const double log_p = double(load(x[token])) * inverse - b.logsumexp[i], p = exp(log_p);
      chosen = -from_log_prob * expm1(log_p) - from_entropy * (p > 0 ? p * (log_p + entropy) : p);
    }
    const auto put = [&](T *to, int64_t j, A logit) { store(to, j == token ? A(chosen) : slope(logit)); };
    each_vector<width>(
        x, vocabulary, whole, [&](int64_t j) { put(grad + j, j, load(x[j])); },
        [&](int64_t j) {
          const Vector<T> v = *reinterpret_cast<const Vector<T> *>(x + j);
          Vector<T> out;
#pragma unroll
          for (int k = 0; k < width; ++k)
            put(out.item + k, j + k, load(v.item[k]));
          *reinterpret_cast<Vector<T> *>(grad + j) = out;
        });
  }
}

// Calls body with the threads of a block, so that each has a few vectors of a row.
template <class T, class Body> void with_threads(const Logits &in, Body &&body) {
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
