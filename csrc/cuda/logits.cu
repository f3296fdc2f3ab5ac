// A block per row of logits, 16 bytes per load. Forward reads a row once: every thread keeps the maximum of
// what it has seen and the sums relative to it (online softmax), and the block merges them. Backward reads
// once and writes once.
#include "cuda/powers.cuh"
#include "cuda/vector.cuh"
#include "math/logit.hpp"
#include <cub/block/block_reduce.cuh>

namespace tokcredit::cuda {
namespace {

// Sums of 2^d, of d * 2^d and of 4^d, d = (x - most) * scale being at most 0. The first leaves out one logit
// that is the largest: where p is close to 1, the sum of the others keeps digits that 1 + others would lose.
template <class A> struct Sums {
  A most;
  double others = -1, weighted = 0, squares = 0; // -1: no logit yet

  __device__ void raise(A to, A scale) {
    const double d = double(floored((most - to) * scale)), factor = double(power_of_two(A(d)));
    weighted = factor * (weighted + d * (1 + others));
    others = factor * (1 + others);
    squares *= factor * factor;
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
    A p = 0, w = 0, r = 0;
    bool left_out = !raised;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const A d = (x[k] - most) * scale, e = power_of_two(d);
      w += e * floored(d);
      r += e * e;
      const bool leave = !left_out && d == 0; // never for inf - inf
      left_out |= leave;
      p += leave ? A(0) : e;
    }
    others += double(p);
    weighted += double(w);
    squares += double(r);
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
    a.squares += b.squares;
    return a;
  }
};

template <class T, class A, int width>
__device__ void numbers(const Vector<T> &v, A (&x)[width], int from = 0) {
#pragma unroll
  for (int k = 0; k < Vector<T>::width; ++k)
    x[from + k] = load(v.item[k]);
}

// Without a softcap the compiler knows so: the formula takes registers.
template <bool caps, class A> __device__ Scaling<A> scaling_in(const Logits &in, int64_t i) {
  Scaling<A> scaling = scaling_of<A>(in, i);
  if (!caps)
    scaling.doubled = 0;
  return scaling;
}

template <class A, int width> __device__ void cap(const Scaling<A> &scaling, A (&x)[width]) {
  if (scaling.doubled > 0) {
#pragma unroll
    for (int k = 0; k < width; ++k)
      x[k] = capped(x[k], scaling.doubled).value;
  }
}

// With `state`, that of LogitsState, only this is written.
template <class T, int threads, bool caps>
__global__ void __launch_bounds__(threads, 1) forward(LogitsForward f, const double *before, double *state) {
  using A = accumulate_t<T>;
  using Reduce = cub::BlockReduce<Sums<A>, threads>;
  __shared__ typename Reduce::TempStorage scratch;
  __shared__ double logsumexp_of[2]; // the largest z, and the logarithm of the sum relative to it
  constexpr int width = Vector<T>::width;
  const Logits &in = f.in;
  const int64_t i = blockIdx.x;
  const Scaling<A> scaling = scaling_in<caps, A>(in, i);
  const A scale = A(log2_e * scaling.factor);
  const T *x = static_cast<const T *>(in.logits) + begin_of(in.places, i);
  const int64_t token = token_of(in, i);
  const bool valid = is_id(in, token);
  Sums<A> own{lowest(A())};
  if (valid) {
    const Vectors<T> vectors(x, in.vocabulary);
    vectors.each_single([&](int j) {
      A one[1] = {load(x[j])};
      cap(scaling, one);
      own.add(one, scale);
    });
    vectors.each_vector(
        [&](int j, int k) {
          const Vector<T> first = load_vector(x + j), second = load_vector(x + k);
          A both[2 * width];
          numbers(first, both);
          numbers(second, both, width);
          cap(scaling, both);
          own.add(both, scale);
        },
        [&](int j) {
          A one[width];
          numbers(load_vector(x + j), one);
          cap(scaling, one);
          own.add(one, scale);
        });
  }
  const Sums<A> all = Reduce(scratch).Reduce(own, Merge<A>{scale});
  // To raise an error for an id outside the vocabulary would mean to wait for the device: its row is NaN.
  const double instead = token == -1 ? 0 : double(NAN);
  const int64_t size = numbers_of_state + in.choices;
  const double most = double(all.most) * scaling.factor;
  if (threadIdx.x == 0 && state) {
    double *joined = state + i * size;
    for (int k = 0; k < numbers_of_state; ++k)
      joined[k] = before ? before[i * size + k] : k == 0 ? -double(INFINITY) : 0.0;
    if (valid) {
      if (all.others != -1) // -1: every logit is -inf
        RowState{most, 1 + all.others, all.weighted * ln_2, all.squares}.join(joined);
      joined[4] += z_of(in, x, scaling, token);
    } else {
      joined[0] += instead;
    }
  } else if (threadIdx.x == 0) {
    double log_prob = instead, entropy = instead, square = instead, logsumexp = instead;
    const double log_sum = all.others == -1 ? double(NAN) : log1p(all.others); // -1: every logit is -inf
    if (valid) {
      log_prob = z_of(in, x, scaling, token) - most - log_sum;
      entropy = log_sum - all.weighted / (1 + all.others) * ln_2;
      square = all.squares / ((1 + all.others) * (1 + all.others));
      logsumexp = most + log_sum;
    }
    logsumexp_of[0] = most;
    logsumexp_of[1] = log_sum;
    static_cast<A *>(f.log_probs)[i] = A(log_prob);
    static_cast<A *>(f.entropies)[i] = A(entropy);
    if (f.squares)
      static_cast<A *>(f.squares)[i] = A(square);
    f.logsumexp[i] = logsumexp;
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < in.choices; k += threads) {
    const int64_t at = i * in.choices + k, id = in.chosen[at];
    const bool counts = valid && id != -1;
    const double z = !counts ? 0 : is_id(in, id) ? z_of(in, x, scaling, id) : double(NAN);
    if (state) {
      const int64_t place = i * size + numbers_of_state + k;
      state[place] = (before ? before[place] : 0) + z;
    } else if (f.chosen_log_probs) {
      static_cast<A *>(f.chosen_log_probs)[at] = A(!valid   ? instead
                                                   : counts ? z - logsumexp_of[0] - logsumexp_of[1]
                                                            : 0);
    }
  }
}

// The gradient of a row with respect to one logit, without that of tanh. Coefficients are times dz / dlogit.
template <class A> struct Slope {
  // log2 p = (v - center) * scale - rest; center and rest are logsumexp in two parts, so that p keeps its
  // digits when the logits are large.
  A center, scale, rest;
  A constant, times_log_p, times_p; // -p * (constant + times_log_p * log2 p - times_p * p)

  __device__ A operator()(A v) const {
    const A d = (v - center) * scale - rest, p = power_of_two(d);
    return -p * (constant + times_log_p * floored(d) - times_p * p);
  }
};

// The same for an id with a coefficient of its own, in double: 1 - p keeps its digits when p is close to 1.
__noinline__ __device__ double slope_of_id(double log_p, double entropy, double square, double its,
                                           double rest, double from_entropy, double from_square) {
  const double p = exp(log_p);
  return -its * expm1(log_p) - rest * p - from_entropy * (p > 0 ? p * (log_p + entropy) : p) +
         from_square * p * (p - square);
}

// The gradient of a chosen id; column -1 where another thread writes it, or none.
template <class A> struct Correction {
  A value;
  int column;
};

template <class T, class G, bool caps>
__global__ void __launch_bounds__(512, 1)
    backward(LogitsBackward b, Correction<accumulate_t<T>> *corrections) {
  using A = accumulate_t<T>;
  constexpr int width = Vector<G>::width, loads = int(sizeof(T) / sizeof(G));
  const Logits &in = b.in;
  const int64_t i = blockIdx.x, vocabulary = in.vocabulary;
  const Scaling<A> scaling = scaling_in<caps, A>(in, i);
  const Incoming<A> incoming(b, i, scaling.slope);
  const T *x = static_cast<const T *>(in.logits) + begin_of(in.places, i);
  G *grad = static_cast<G *>(b.grad) + begin_of(b.grad_places, i);
  const int64_t token = incoming.token;
  if (token == -1 || !incoming.moves) {
    const auto clear = [&](int j) { store_vector(grad + j, Vector<G>{}); };
    const Vectors<G> vectors(grad, vocabulary);
    vectors.each_single([&](int j) { grad[j] = G{}; });
    vectors.each_vector(
        [&](int j, int k) {
          clear(j);
          clear(k);
        },
        clear);
    return;
  }
  const double entropy = static_cast<const A *>(b.entropies)[i], logsumexp = b.logsumexp[i];
  const double square = b.grad_squares ? double(static_cast<const A *>(b.squares)[i]) : 0;
  const double from_entropy = incoming.from_entropy, from_square = incoming.from_square;
  const A center = A(logsumexp / scaling.factor);
  const double rest = (logsumexp - double(center) * scaling.factor) * log2_e;
  const double none = is_id(in, token) ? 0 : double(NAN);
  const Slope<A> slope{center,
                       A(log2_e * scaling.factor),
                       A(rest),
                       A(incoming.every + from_entropy * entropy + from_square * square + none),
                       A(from_entropy * ln_2),
                       A(from_square)};
  const auto of_logit = [&](A logit) {
    if (scaling.doubled > 0) {
      const Capped<A> c = capped(logit, scaling.doubled);
      return slope(c.value) * c.slope;
    }
    return slope(logit);
  };
  const auto of_id = [&](int64_t id, A logit) {
    const Capped<A> c = scaling.doubled > 0 ? capped(logit, scaling.doubled) : Capped<A>{logit, A(1)};
    const double its = incoming.of_id(id);
    return A(slope_of_id(double(c.value) * scaling.factor - logsumexp, entropy, square, its,
                         incoming.every - its, from_entropy, from_square) *
             double(c.slope));
  };
  // Before the gradient lies over the logits, and once: numbers in double take registers.
  __shared__ A of_token;
  const int own = int(column_of(in, token));
  if (threadIdx.x == 0 && own >= 0)
    of_token = of_id(token, load(x[own]));
  for (int64_t k = threadIdx.x; k < incoming.choices; k += blockDim.x) {
    const int64_t id = incoming.ids[k], column = column_of(in, id);
    bool writes = column >= 0 && id != token;
    for (int64_t l = 0; l < k && writes; ++l)
      writes = incoming.ids[l] != id;
    corrections[i * in.choices + k] = {writes ? of_id(id, load(x[column])) : A(0), writes ? int(column) : -1};
  }
  __syncthreads();
  // The gradient of a vector's logits.
  const auto found = [&](int j, const A(&logits)[width]) {
    A out[width];
    if (scaling.doubled > 0) {
#pragma unroll
      for (int k = 0; k < width; ++k)
        out[k] = of_logit(logits[k]);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k)
        out[k] = slope(logits[k]);
    }
    if (unsigned(own - j) < unsigned(width)) {
#pragma unroll
      for (int k = 0; k < width; ++k)
        out[k] = j + k == own ? of_token : out[k];
    }
    Vector<G> stored;
#pragma unroll
    for (int k = 0; k < width; ++k)
      store(stored.item + k, out[k]);
    return stored;
  };
  const auto read = [&](int j, A(&logits)[width]) {
#pragma unroll
    for (int k = 0; k < loads; ++k)
      numbers(load_vector(x + j + k * Vector<T>::width), logits, k * Vector<T>::width);
  };
  if constexpr (loads == 1) {
    // Pairs of vectors that start at the same place inside 16 bytes.
    const bool whole = (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(grad)) % 16 == 0;
    const Vectors<G> vectors(grad, vocabulary, whole);
    vectors.each_single([&](int j) {
      const A logit = load(x[j]);
      store(grad + j, j == own ? of_token : of_logit(logit));
    });
    vectors.each_vector(
        [&](int j, int k) {
          A first[width], second[width];
          read(j, first);
          read(k, second);
          store_vector(grad + j, found(j, first));
          store_vector(grad + k, found(k, second));
        },
        [&](int j) {
          A logits[width];
          read(j, logits);
          store_vector(grad + j, found(j, logits));
        });
  } else {
    // Narrower than the logits, and maybe over them: a strip is read by all threads before it is written.
    const bool whole = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(grad)) % 16 == 0;
    const int size = int(vocabulary), step = whole ? width : 1;
    for (int64_t first = 0; first < size; first += int64_t(step) * blockDim.x) {
      const int64_t j = first + int64_t(threadIdx.x) * step;
      const int n = j < size ? int(min(int64_t(step), size - j)) : 0;
      A logits[width];
      if (n == width) {
        read(int(j), logits);
      } else {
#pragma unroll
        for (int k = 0; k < width; ++k)
          logits[k] = k < n ? load(x[j + k]) : A(0);
      }
      __syncthreads();
      if (n == width) {
        store_vector(grad + j, found(int(j), logits));
      } else if (n > 0) {
        const Vector<G> stored = found(int(j), logits);
#pragma unroll
        for (int k = 0; k < width; ++k)
          if (k < n)
            grad[j + k] = stored.item[k];
      }
    }
  }
  if (incoming.choices > 0) {
    __syncthreads();
    for (int64_t k = threadIdx.x; k < incoming.choices; k += blockDim.x) {
      const Correction<A> c = corrections[i * in.choices + k];
      if (c.column >= 0)
        store(grad + c.column, c.value);
    }
  }
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

void run(const LogitsForward &f, const double *before, double *state, Queue &queue) {
  with_float(f.in.type, [&](auto t) {
    using T = typename decltype(t)::type;
    with_threads<T>(f.in, [&](auto threads) {
      if (f.in.softcap < INFINITY)
        launch("logits", queue, forward<T, 128, true>, f.in.rows, 128, f, before, state);
      else
        launch("logits", queue, forward<T, decltype(threads)::value, false>, f.in.rows, threads, f, before,
               state);
    });
  });
}

} // namespace

void logits(const LogitsForward &f, Queue &queue) { run(f, nullptr, nullptr, queue); }

void logits_state(const LogitsState &s, Queue &queue) {
  run({s.in, nullptr, nullptr, nullptr, nullptr, nullptr}, s.before, s.state, queue);
}

void logits_gradient(const LogitsBackward &b, Queue &queue) {
  with_gradient(b, [&](auto t, auto g) {
    using T = typename decltype(t)::type;
    using Entry = Correction<accumulate_t<T>>;
    Entry *corrections = nullptr;
    if (b.grad_chosen && b.in.choices > 0)
      corrections = static_cast<Entry *>(queue.allocate(b.in.rows * b.in.choices * int64_t(sizeof(Entry))));
    const auto kernel = b.in.softcap < INFINITY ? backward<T, typename decltype(g)::type, true>
                                                : backward<T, typename decltype(g)::type, false>;
    with_threads<T>(b.in, [&](auto threads) {
      launch("logits", queue, kernel, b.in.rows, int(threads), b, corrections);
    });
  });
}

} // namespace tokcredit::cuda
