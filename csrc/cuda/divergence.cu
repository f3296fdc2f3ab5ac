// A block per row, 16 bytes per load. A first pass finds the normalizers of both distributions by online
// softmax, and the KL divergences with them; the divergences from a mixture take a second, from cache where
// it holds the row. Backward reads both once and writes once.
#include "cuda/softmax.cuh"
#include "cuda/vector.cuh"
#include "math/dispatch.hpp"
#include "math/divergence.hpp"
#include "ops/divergence.hpp"
#include <cub/block/block_reduce.cuh>

namespace tokcredit::cuda {
namespace {

// The logits of one row of both; the teacher's may be a mixture of two.
template <class T> struct Row {
  using A = accumulate_t<T>;
  static constexpr int width = Vector<T>::width;
  const T *student, *teacher, *other;
  A weight;
  int size;

  __device__ Row(const DivergenceRows &in, int64_t i) : size(int(in.vocabulary)) {
    const int64_t at = i * in.vocabulary;
    student = static_cast<const T *>(in.student) + at;
    teacher = static_cast<const T *>(in.teacher) + at;
    weight = in.other ? static_cast<const A *>(in.weights)[i] : A(0);
    other = weight == A(0) ? nullptr : static_cast<const T *>(in.other) + at;
  }

  __device__ double student_at(int j) const { return double(load(student[j])); }
  __device__ double teacher_at(int j) const {
    const A logit = load(teacher[j]);
    return double(other ? mixed(logit, A(load(other[j])), weight) : logit);
  }

  // Vectors of all start at the same places inside 16 bytes, or there are none.
  __device__ Vectors<T> vectors(const T *result) const {
    const auto place = [](const T *x) { return reinterpret_cast<uintptr_t>(x) % 16; };
    return Vectors<T>(student, size,
                      place(student) == place(teacher) && place(student) == place(result) &&
                          (!other || place(student) == place(other)));
  }

  // Calls one(j, s, t) for each element outside of vectors and several(j, s, t) for each vector, with arrays
  // of numbers.
  template <class One, class Several>
  __device__ void each(const T *result, One &&one, Several &&several) const {
    const Vectors<T> all = vectors(result);
    all.each_single([&](int j) {
      const A s[1] = {load(student[j])};
      A t[1] = {load(teacher[j])};
      if (other)
        t[0] = mixed(t[0], A(load(other[j])), weight);
      one(j, s, t);
    });
    const auto vector = [&](int j, const Vector<T> &x, const Vector<T> &y) {
      A s[width], t[width];
#pragma unroll
      for (int k = 0; k < width; ++k) {
        s[k] = load(x.item[k]);
        t[k] = load(y.item[k]);
      }
      if (other) {
        const Vector<T> z = load_vector(other + j);
#pragma unroll
        for (int k = 0; k < width; ++k)
          t[k] = mixed(t[k], A(load(z.item[k])), weight);
      }
      several(j, s, t);
    };
    all.each_vector(
        [&](int j, int k) {
          const Vector<T> x = load_vector(student + j), y = load_vector(teacher + j);
          const Vector<T> u = load_vector(student + k), v = load_vector(teacher + k);
          vector(j, x, y);
          vector(k, u, v);
        },
        [&](int j) { vector(j, load_vector(student + j), load_vector(teacher + j)); });
  }
};

template <class A> struct Both {
  Sums<A> student, teacher;
};

template <class A> struct Merge {
  A scale;
  __device__ Both<A> operator()(Both<A> a, const Both<A> &b) const {
    a.student.merge(b.student, scale);
    a.teacher.merge(b.teacher, scale);
    return a;
  }
};

struct Add {
  __device__ Terms<double> operator()(const Terms<double> &a, const Terms<double> &b) const {
    return {a.value + b.value, a.slope + b.slope};
  }
};

// In double, of the few elements with a large probability.
template <Divergence kind, class A>
__noinline__ __device__ Terms<double> terms_exactly(const LogProbs<A> &logs, double s, double t,
                                                    double share) {
  Terms<double> sum{0, 0};
  add_exact_terms<kind>(sum, logs, s, t, share);
  return sum;
}
template <Divergence kind, class A>
__noinline__ __device__ double slope_exactly(const LogProbs<A> &logs, double s, double t, double share,
                                             double sum) {
  return exact_slope<kind>(logs, s, t, share, sum);
}

template <Divergence kind, class T, int threads>
__global__ void __launch_bounds__(threads, 2) forward(DivergenceForward f) {
  using A = accumulate_t<T>;
  using Reduce = cub::BlockReduce<Both<A>, threads>;
  using ReduceTerms = cub::BlockReduce<Terms<double>, threads>;
  __shared__ union {
    typename Reduce::TempStorage sums;
    typename ReduceTerms::TempStorage terms;
  } scratch;
  __shared__ double logsumexp[2];
  const int64_t i = blockIdx.x;
  double *saved = f.saved + i * saved_of_divergence;
  A *values = static_cast<A *>(f.values), *entropies = static_cast<A *>(f.entropies);
  if (f.in.mask && !f.in.mask[i]) {
    if (threadIdx.x == 0) {
      values[i] = entropies[i] = 0;
      saved[0] = saved[1] = saved[2] = 0;
    }
    return;
  }
  constexpr bool forward_kl = kind == Divergence::forward_kl, reverse_kl = kind == Divergence::reverse_kl;
  const double inverse = 1 / f.in.temperature;
  const A scale = A(log2_e * inverse);
  const Row<T> row(f.in, i);
  A apart = 0;
  if (!has_mixture(kind) && row.size > 0) { // about the distance of the two, the same for all threads
    const A first = load(row.teacher[0]) - load(row.student[0]);
    apart = first - first == 0 ? offset(first) : A(0);
  }
  Both<A> own{{lowest(A())}, {lowest(A())}};
  const auto add = [&](int, const auto &s, const auto &t) {
    const auto between = [&](int k) { return t[k] - (s[k] + apart); };
    const auto exactly = [&](int k) { return double(t[k]) - double(s[k]) - double(apart); };
    own.student.template add<reverse_kl>(s, scale, between, exactly);
    own.teacher.template add<forward_kl>(t, scale, between, exactly);
  };
  row.each(row.student, add, add);
  const Both<A> all = Reduce(scratch.sums).Reduce(own, Merge<A>{scale});
  if (threadIdx.x == 0) {
    const double log_s = log1p(all.student.others), log_t = log1p(all.teacher.others);
    double value = double(NAN), entropy = value;
    logsumexp[0] = double(all.student.most) * inverse + log_s;
    logsumexp[1] = double(all.teacher.most) * inverse + log_t;
    const double both = logsumexp[0] + logsumexp[1]; // a row of -inf only: log1p(-1)
    if (both - both == 0) {
      entropy = log_s - all.student.weighted / (1 + all.student.others) * ln_2;
      // The mean of log q - log p is that of what was summed, and this.
      const double off =
          (double(apart) - (double(all.teacher.most) - double(all.student.most))) * inverse + log_s - log_t;
      if (forward_kl)
        value = all.teacher.difference * inverse / (1 + all.teacher.others) + off;
      else if (reverse_kl)
        value = -all.student.difference * inverse / (1 + all.student.others) - off;
    } else {
      logsumexp[0] = logsumexp[1] = double(NAN);
    }
    values[i] = A(value);
    entropies[i] = A(entropy);
    saved[0] = logsumexp[0];
    saved[1] = logsumexp[1];
    saved[2] = value;
  }
  if constexpr (has_mixture(kind)) {
    __syncthreads();
    if (logsumexp[0] != logsumexp[0])
      return; // NaN is written
    const LogProbs<A> logs(logsumexp, f.in.temperature);
    const A share = A(f.in.share);
    Terms<double> terms{0, 0};
    const auto add_terms = [&](int j, const auto &s, const auto &t) {
      A value = 0, slope = 0;
      unsigned large = 0;
#pragma unroll
      for (int k = 0; k < int(sizeof(s) / sizeof(A)); ++k) {
        const A log_p = logs.log_p(s[k]), log_q = logs.log_q(t[k]);
        const bool leave = is_large(log_p, log_q);
        const Terms<A> one = divergence_terms<kind>(log_p, log_q, logs.delta(s[k], t[k]), share);
        value += leave ? A(0) : one.value;
        slope += leave ? A(0) : one.slope;
        large |= unsigned(leave) << k;
      }
      terms.value += double(value);
      terms.slope += double(slope);
      for (; large; large &= large - 1) {
        const int at = j + __ffs(int(large)) - 1;
        terms = Add()(terms, terms_exactly<kind>(logs, row.student_at(at), row.teacher_at(at), f.in.share));
      }
    };
    row.each(row.student, add_terms, add_terms);
    const Terms<double> sum = ReduceTerms(scratch.terms).Reduce(terms, Add());
    if (threadIdx.x == 0) {
      values[i] = A(sum.value);
      saved[2] = sum.slope;
    }
  }
}

template <Divergence kind, class T, int threads>
__global__ void __launch_bounds__(threads, 2) backward(DivergenceBackward b) {
  using A = accumulate_t<T>;
  const int64_t i = blockIdx.x, vocabulary = b.in.vocabulary;
  T *grad = static_cast<T *>(b.grad) + i * vocabulary;
  const double given = double(static_cast<const A *>(b.grad_values)[i]) / b.in.temperature;
  if ((b.in.mask && !b.in.mask[i]) || given == 0) {
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
  const double *saved = b.saved + i * saved_of_divergence, sum = saved[2];
  const double every = saved[0] + saved[1] + sum;
  const double factor = every - every == 0 ? given : double(NAN);
  const LogProbs<A> logs(saved, b.in.temperature);
  const A share = A(b.in.share), subtracted = A(sum), times = A(factor);
  const Row<T> row(b.in, i);
  const auto slopes = [&](int j, const auto &s, const auto &t, auto &out) {
    constexpr int count = sizeof(out) / sizeof(A);
    unsigned large = 0;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const A log_p = logs.log_p(s[k]), log_q = logs.log_q(t[k]);
      large |= unsigned(bool(is_large(log_p, log_q))) << k;
      out[k] = divergence_slope<kind>(log_p, log_q, logs.delta(s[k], t[k]), share, subtracted) * times;
    }
    for (; large; large &= large - 1) {
      const int at = __ffs(int(large)) - 1;
      const A instead = A(factor * slope_exactly<kind>(logs, row.student_at(j + at), row.teacher_at(j + at),
                                                       b.in.share, sum));
#pragma unroll
      for (int k = 0; k < count; ++k)
        out[k] = k == at ? instead : out[k];
    }
  };
  row.each(
      grad,
      [&](int j, const auto &s, const auto &t) {
        A out[1];
        slopes(j, s, t, out);
        store(grad + j, out[0]);
      },
      [&](int j, const auto &s, const auto &t) {
        A out[Vector<T>::width];
        slopes(j, s, t, out);
        Vector<T> stored;
#pragma unroll
        for (int k = 0; k < Vector<T>::width; ++k)
          store(stored.item + k, out[k]);
        store_vector(grad + j, stored);
      });
}

constexpr int block_threads = 256;

void check_vocabulary(const DivergenceRows &in) {
  if (in.vocabulary >= int64_t(1) << 31)
    throw std::invalid_argument("divergence: vocabulary: expected fewer than 2^31, got " +
                                std::to_string(in.vocabulary));
}

} // namespace

void divergence(const DivergenceForward &f, Queue &queue) {
  check_vocabulary(f.in);
  with_divergence(f.in.kind, [&](auto kind) {
    with_float(f.in.type, [&](auto t) {
      launch("divergence", queue, forward<decltype(kind)::value, typename decltype(t)::type, block_threads>,
             f.in.rows, block_threads, f);
    });
  });
}

void divergence_gradient(const DivergenceBackward &b, Queue &queue) {
  check_vocabulary(b.in);
  with_divergence(b.in.kind, [&](auto kind) {
    with_float(b.in.type, [&](auto t) {
      launch("divergence", queue, backward<decltype(kind)::value, typename decltype(t)::type, block_threads>,
             b.in.rows, block_threads, b);
    });
  });
}

} // namespace tokcredit::cuda
