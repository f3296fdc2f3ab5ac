// A block per row. Forward reads the student's row once: the ids are sorted in shared memory, so that what is
// outside of them is summed alone, and joins them afterwards in double. Backward reads once and writes once.
#include "cuda/softmax.cuh"
#include "cuda/vector.cuh"
#include "math/dispatch.hpp"
#include "math/divergence_top.hpp"
#include <cub/block/block_reduce.cuh>

namespace tokcredit::cuda {
namespace {

constexpr int threads = 256;
constexpr int none = 2147483647;

// The ids of a row: as they are given, and in rising order, both `none` where there is none. An id outside of
// the vocabulary is -1, and so the first.
struct Ids {
  int given[most_top], sorted[most_top];

  // All threads call it. Returns whether all ids are in the vocabulary.
  __device__ bool load(const TopRows &in, int64_t row) {
    for (int a = threadIdx.x; a < in.top; a += threads) {
      const int64_t id = id_at(in, row * in.top + a);
      given[a] = id == -1 ? none : id >= 0 && id < in.vocabulary ? int(id) : -1;
    }
    __syncthreads();
    for (int a = threadIdx.x; a < in.top; a += threads) {
      int rank = 0;
      for (int b = 0; b < in.top; ++b)
        rank += given[b] < given[a] || (given[b] == given[a] && b < a);
      sorted[rank] = given[a];
    }
    __syncthreads();
    return sorted[0] >= 0;
  }

  // Whether it was given before; then it does not count.
  __device__ bool again(int a) const {
    for (int b = 0; b < a; ++b)
      if (given[b] == given[a])
        return true;
    return false;
  }

  // Where ids of at least `id` begin among `count`.
  __device__ int from(int id, int count) const {
    int low = 0;
    while (low < count) {
      const int middle = (low + count) / 2;
      if (sorted[middle] < id)
        low = middle + 1;
      else
        count = middle;
    }
    return low;
  }
};

struct Merge {
  double scale;
  __device__ Sums<double> operator()(Sums<double> a, const Sums<double> &b) const {
    a.merge(b, scale);
    return a;
  }
};

struct Add {
  __device__ Terms<double> operator()(const Terms<double> &a, const Terms<double> &b) const {
    return {a.value + b.value, a.slope + b.slope};
  }
};

template <class A> __device__ Sums<double> wide(const Sums<A> &x) {
  return {double(x.most), x.others, x.weighted, 0};
}

template <Divergence kind, class T>
__global__ void __launch_bounds__(threads, 2) forward(DivergenceTopForward f) {
  using A = accumulate_t<T>;
  using Reduce = cub::BlockReduce<Sums<double>, threads>;
  using ReduceTerms = cub::BlockReduce<Terms<double>, threads>;
  constexpr int width = Vector<T>::width;
  __shared__ Ids ids;
  __shared__ typename Reduce::TempStorage scratch;
  __shared__ typename ReduceTerms::TempStorage scratch_of_terms[2];
  __shared__ double logsumexp, log_p_rest;
  __shared__ Terms<double> inside, total;
  const TopRows &in = f.in;
  const int64_t i = blockIdx.x;
  const int top = int(in.top);
  double *saved = f.saved + 2 * i, *slopes = f.slopes + i * in.top;
  A *values = static_cast<A *>(f.values), *entropies = static_cast<A *>(f.entropies);
  const A *log_probs = static_cast<const A *>(f.log_probs) + i * in.top;
  if (in.mask && !in.mask[i]) {
    for (int a = threadIdx.x; a < top; a += threads)
      slopes[a] = 0;
    if (threadIdx.x == 0) {
      values[i] = entropies[i] = 0;
      saved[0] = saved[1] = 0;
    }
    return;
  }
  // To raise an error for an id outside the vocabulary would mean to wait for the device: its row is NaN.
  if (!ids.load(in, i)) {
    for (int a = threadIdx.x; a < top; a += threads)
      slopes[a] = double(NAN);
    if (threadIdx.x == 0) {
      values[i] = entropies[i] = A(NAN);
      saved[0] = saved[1] = double(NAN);
    }
    return;
  }
  const T *x = static_cast<const T *>(in.student) + i * in.vocabulary;
  const double inverse = 1 / in.temperature, scale = log2_e * inverse;
  Sums<A> rest{lowest(A())};
  const auto nothing = [](int) { return 0.0; };
  const auto add = [&](int j, auto &numbers) {
    constexpr int count = sizeof(numbers) / sizeof(A);
    for (int at = ids.from(j, top); at < top && ids.sorted[at] < j + count; ++at) {
#pragma unroll
      for (int k = 0; k < count; ++k)
        numbers[k] = ids.sorted[at] == j + k ? -A(INFINITY) : numbers[k];
    }
    rest.template add<false>(numbers, A(scale), nothing, nothing);
  };
  const auto add_vector = [&](int j, const Vector<T> &v) {
    A numbers[width];
#pragma unroll
    for (int k = 0; k < width; ++k)
      numbers[k] = load(v.item[k]);
    add(j, numbers);
  };
  const Vectors<T> vectors(x, in.vocabulary);
  vectors.each_single([&](int j) {
    A one[1] = {load(x[j])};
    add(j, one);
  });
  vectors.each_vector(
      [&](int j, int k) {
        const Vector<T> first = load_vector(x + j), second = load_vector(x + k);
        add_vector(j, first);
        add_vector(k, second);
      },
      [&](int j) { add_vector(j, load_vector(x + j)); });
  const Sums<double> outside = Reduce(scratch).Reduce(wide(rest), Merge{scale});
  Sums<double> own{lowest(0.0)};
  for (int a = threadIdx.x; a < top; a += threads)
    if (ids.given[a] != none && !ids.again(a)) {
      const double one[1] = {double(load(x[ids.given[a]]))};
      own.add<false>(one, scale, nothing, nothing);
    }
  __syncthreads(); // scratch is used again
  const Sums<double> given = Reduce(scratch).Reduce(own, Merge{scale});
  if (threadIdx.x == 0) {
    const Sums<double> all = Merge{scale}(outside, given);
    const double log_sum = log1p(all.others);
    logsumexp = all.others != -1 ? double(all.most) * inverse + log_sum : double(NAN);
    log_p_rest =
        outside.others == -1 ? -double(INFINITY) : outside.most * inverse + log1p(outside.others) - logsumexp;
    const double entropy = log_sum - all.weighted / (1 + all.others) * ln_2;
    entropies[i] = A(logsumexp - logsumexp == 0 ? entropy : double(NAN));
  }
  __syncthreads();
  const auto log_p = [&](int a) { return double(load(x[ids.given[a]])) * inverse - logsumexp; };
  Terms<double> masses{0, 0};
  for (int a = threadIdx.x; a < top; a += threads)
    if (ids.given[a] != none && !ids.again(a))
      masses = Add()(masses, {exp(log_p(a)), exp(double(log_probs[a]))});
  masses = ReduceTerms(scratch_of_terms[0]).Reduce(masses, Add());
  if (threadIdx.x == 0)
    inside = masses;
  __syncthreads();
  const Outcomes outcomes(f.outside, f.share, inside.value, inside.slope, log_p_rest);
  Terms<double> terms{0, 0};
  for (int a = threadIdx.x; a < top; a += threads)
    if (ids.given[a] != none && !ids.again(a))
      terms = Add()(terms, outcomes.terms<kind>(log_p(a), double(log_probs[a])));
  terms = ReduceTerms(scratch_of_terms[1]).Reduce(terms, Add());
  if (threadIdx.x == 0) {
    total = outcomes.total<kind>(terms);
    if (logsumexp - logsumexp != 0)
      total.value = double(NAN);
    values[i] = A(total.value);
    saved[0] = logsumexp;
    saved[1] = outcomes.slope_outside<kind>(total.slope) + (total.value - total.value);
  }
  __syncthreads();
  for (int a = threadIdx.x; a < top; a += threads) {
    int first = 0; // the place that counts
    while (ids.given[first] != ids.given[a])
      ++first;
    slopes[a] = ids.given[a] == none
                    ? 0
                    : outcomes.slope<kind>(log_p(first), double(log_probs[first]), total.slope) +
                          (total.value - total.value);
  }
}

template <class T> __global__ void __launch_bounds__(threads) backward(DivergenceTopBackward b) {
  using A = accumulate_t<T>;
  constexpr int width = Vector<T>::width;
  const TopRows &in = b.in;
  const int64_t i = blockIdx.x;
  const double given = double(static_cast<const A *>(b.grad_values)[i]) / in.temperature;
  const bool reads = !(in.mask && !in.mask[i]) && given != 0;
  const T *x = static_cast<const T *>(in.student) + i * in.vocabulary;
  T *grad = static_cast<T *>(b.grad) + i * in.vocabulary;
  const double logsumexp = b.saved[2 * i];
  const A factor = A(given * b.saved[2 * i + 1]), inverse = A(1 / in.temperature);
  const Shift<A> off(A(logsumexp * in.temperature), logsumexp, in.temperature);
  const auto slope = [&](T logit) {
    return reads ? exponential((A(load(logit)) - off.center) * inverse - off.rest) * factor : A(0);
  };
  const auto put = [&](int j, const Vector<T> &v) {
    Vector<T> stored;
#pragma unroll
    for (int k = 0; k < width; ++k)
      store(stored.item + k, slope(v.item[k]));
    store_vector(grad + j, stored);
  };
  const bool whole = (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(grad)) % 16 == 0;
  const Vectors<T> vectors(x, in.vocabulary, whole);
  vectors.each_single([&](int j) { store(grad + j, slope(x[j])); });
  vectors.each_vector(
      [&](int j, int k) {
        const Vector<T> first = load_vector(x + j), second = load_vector(x + k);
        put(j, first);
        put(k, second);
      },
      [&](int j) { put(j, load_vector(x + j)); });
  __syncthreads();
  if (!reads)
    return;
  for (int a = threadIdx.x; a < in.top; a += threads) {
    const int64_t id = id_at(in, i * in.top + a);
    bool first = id >= 0 && id < in.vocabulary; // one thread writes a logit
    for (int c = 0; c < a && first; ++c)
      first = id_at(in, i * in.top + c) != id;
    if (first)
      store(grad + id, A(given * b.slopes[i * in.top + a]));
  }
}

void check_vocabulary(const TopRows &in) {
  if (in.vocabulary >= none)
    throw std::invalid_argument("divergence: vocabulary: expected fewer than 2^31 - 1, got " +
                                std::to_string(in.vocabulary));
}

} // namespace

void divergence_top(const DivergenceTopForward &f, Queue &queue) {
  check_vocabulary(f.in);
  with_divergence(f.kind, [&](auto kind) {
    with_float(f.in.type, [&](auto t) {
      launch("divergence", queue, forward<decltype(kind)::value, typename decltype(t)::type>, f.in.rows,
             threads, f);
    });
  });
}

void divergence_top_gradient(const DivergenceTopBackward &b, Queue &queue) {
  check_vocabulary(b.in);
  with_float(b.in.type, [&](auto t) {
    launch("divergence", queue, backward<typename decltype(t)::type>, b.in.rows, threads, b);
  });
}

} // namespace tokcredit::cuda
