#include "cpu/logits_rows.hpp"
#include "cpu/blocks.hpp"
#include "math/logit.hpp"

namespace tokcredit::cpu {
namespace {

// Sums over a row relative to the largest v so far, with d = (v - most) * factor, in double by lanes:
// exp(d), exp(d) * d and exp(d)^2.
template <class A> struct Sums {
  A most = A(-INFINITY), factor;
  double exps[lanes] = {}, weighted[lanes] = {}, squares[lanes] = {};

  // Values of v, and -inf to the end of a pack.
  void add(const A *values, int64_t n) {
    const A top = largest_of(values, n);
    if (top > most)
      raise(top);
    const A from = most == A(-INFINITY) ? A(0) : most;
    Pack<A> own{}, times{}, twice{};
    for (int64_t k = 0; k < n; k += lanes) {
      Pack<A> d = (Pack<A>(values + k) - from) * factor;
      d = choose(d < lowest<A>, Pack<A>(lowest<A>), d);
      const Pack<A> p = exponential(d);
      own = own + p;
      times = times + p * d;
      twice = twice + p * p;
    }
    own.add_to(exps);
    times.add_to(weighted);
    twice.add_to(squares);
  }

private:
  void raise(A to) {
    const double change = (double(most) - double(to)) * double(factor);
    const double d = change < lowest<double> ? lowest<double> : change, f = std::exp(d);
    most = to;
    for (int64_t k = 0; k < lanes; ++k) {
      weighted[k] = f * (weighted[k] + d * exps[k]);
      exps[k] *= f;
      squares[k] *= f * f;
    }
  }
};

double total(const double *by_lane) {
  double sum = 0;
  for (int64_t k = 0; k < lanes; ++k)
    sum += by_lane[k];
  return sum;
}

// The values v of a block of n logits, and with `slopes` the derivatives of tanh.
template <class A> void cap(A doubled, int64_t n, A *values, A *slopes) {
  for (int64_t k = 0; k < n; k += lanes) {
    const Capped<Pack<A>> c = capped(Pack<A>(values + k), Pack<A>(doubled));
    c.value.store(values + k, lanes);
    if (slopes)
      c.slope.store(slopes + k, lanes);
  }
}

template <class T> const T *row_of(const Logits &in, int64_t i) {
  return static_cast<const T *>(in.logits) + begin_of(in.places, i);
}

template <class T, class A> RowState state_of(const Logits &in, const T *x, const Scaling<A> &scaling) {
  Sums<A> sums{A(-INFINITY), A(scaling.factor)};
  A values[block];
  for (int64_t i = 0; i < in.vocabulary; i += block) {
    const int64_t n = in.vocabulary - i < block ? in.vocabulary - i : block;
    read(x + i, n, A(-INFINITY), values);
    if (scaling.doubled > 0)
      cap<A>(scaling.doubled, n, values, nullptr);
    sums.add(values, n);
  }
  return {double(sums.most) * scaling.factor, total(sums.exps), total(sums.weighted), total(sums.squares)};
}

template <class T> void forward(const LogitsForward &f, int64_t i) {
  using A = accumulate_t<T>;
  const int64_t token = token_of(f.in, i);
  double log_prob = 0, entropy = 0, square = 0, logsumexp = 0;
  if (token >= 0) {
    const T *x = row_of<T>(f.in, i);
    const Scaling<A> scaling = scaling_of<A>(f.in, i);
    const RowState s = state_of(f.in, x, scaling);
    const bool none = s.most == -INFINITY; // a row of -inf
    const double log_s = none ? double(NAN) : std::log(s.exps);
    const auto log_p = [&](int64_t id) { return z_of(f.in, x, scaling, id) - s.most - log_s; };
    log_prob = log_p(token);
    entropy = log_s - s.weighted / s.exps;
    square = none ? double(NAN) : s.squares / (s.exps * s.exps);
    logsumexp = s.most + log_s;
    for (int64_t k = 0; f.chosen_log_probs && k < f.in.choices; ++k) {
      const int64_t at = i * f.in.choices + k;
      static_cast<A *>(f.chosen_log_probs)[at] = f.in.chosen[at] < 0 ? A(0) : A(log_p(f.in.chosen[at]));
    }
  } else if (f.chosen_log_probs) {
    for (int64_t k = 0; k < f.in.choices; ++k)
      static_cast<A *>(f.chosen_log_probs)[i * f.in.choices + k] = 0;
  }
  static_cast<A *>(f.log_probs)[i] = A(log_prob);
  static_cast<A *>(f.entropies)[i] = A(entropy);
  if (f.squares)
    static_cast<A *>(f.squares)[i] = A(square);
  f.logsumexp[i] = logsumexp;
}

template <class T> void join(const LogitsState &s, int64_t i) {
  using A = accumulate_t<T>;
  const int64_t token = token_of(s.in, i), size = numbers_of_state + s.in.choices;
  double *all = s.state + i * size;
  for (int64_t k = 0; k < size; ++k)
    all[k] = s.before ? s.before[i * size + k] : k == 0 ? -double(INFINITY) : 0.0;
  if (token < 0)
    return;
  const T *x = row_of<T>(s.in, i);
  const Scaling<A> scaling = scaling_of<A>(s.in, i);
  state_of(s.in, x, scaling).join(all);
  all[4] += z_of(s.in, x, scaling, token);
  for (int64_t k = 0; k < s.in.choices; ++k)
    all[numbers_of_state + k] += z_of(s.in, x, scaling, s.in.chosen[i * s.in.choices + k]);
}

// The gradient of a row. log p = (v - center) * factor - rest; center and rest are logsumexp in two parts, so
// that p keeps its digits when the logits are large.
template <class A> struct Slope {
  A center, factor, rest;
  A entropy;
  A from_log_prob, from_entropy, from_square; // times dz / dlogit

  Pack<A> operator()(const Pack<A> &v) const {
    Pack<A> d = (v - center) * factor - rest;
    d = choose(d < lowest<A>, Pack<A>(lowest<A>), d);
    const Pack<A> p = exponential(d);
    return -p * (from_log_prob + from_entropy * (d + entropy) - from_square * p);
  }
};

template <class T, class G> void backward(const LogitsBackward &b, int64_t i) {
  using A = accumulate_t<T>;
  const Scaling<A> scaling = scaling_of<A>(b.in, i);
  const Incoming<A> incoming(b, i, scaling.slope);
  const T *x = row_of<T>(b.in, i);
  G *grad = static_cast<G *>(b.grad) + begin_of(b.grad_places, i);
  if (incoming.token < 0 || !incoming.moves) {
    __builtin_memset(grad, 0, b.in.vocabulary * sizeof(G));
    return;
  }
  const double from_entropy = incoming.from_entropy, from_square = incoming.from_square;
  const double entropy = static_cast<const A *>(b.entropies)[i], logsumexp = b.logsumexp[i];
  const double square = b.grad_squares ? double(static_cast<const A *>(b.squares)[i]) : 0.0;
  const A center = A(logsumexp / scaling.factor);
  const Slope<A> slope{center,
                       A(scaling.factor),
                       A(logsumexp - double(center) * scaling.factor),
                       A(entropy),
                       A(incoming.every + from_square * square),
                       A(from_entropy),
                       A(from_square)};
  // An id with a coefficient of its own, in double: 1 - p keeps its digits when p is close to 1.
  const auto exactly = [&](int64_t id, A logit) {
    const double log_p = double(scaling.value(logit)) * scaling.factor - logsumexp, p = std::exp(log_p);
    const double its = incoming.of_id(id), spread = p > 0 ? from_entropy * p * (log_p + entropy) : p;
    const double of_z =
        -its * std::expm1(log_p) - (incoming.every - its) * p - spread + from_square * p * (p - square);
    return A(scaling.doubled > 0 ? of_z * double(capped(logit, scaling.doubled).slope) : of_z);
  };
  A values[block], slopes[block];
  for (int64_t j = 0; j < b.in.vocabulary; j += block) {
    const int64_t n = b.in.vocabulary - j < block ? b.in.vocabulary - j : block;
    read(x + j, n, A(0), values);
    if (scaling.doubled > 0)
      cap(scaling.doubled, n, values, slopes);
    for (int64_t k = 0; k < n; k += lanes)
      slope(Pack<A>(values + k)).store(values + k, lanes);
    if (scaling.doubled > 0)
      for (int64_t k = 0; k < n; k += lanes)
        (Pack<A>(values + k) * Pack<A>(slopes + k)).store(values + k, lanes);
    const auto correct = [&](int64_t id) {
      const int64_t k = column_of(b.in, id) - j;
      if (k >= 0 && k < n)
        values[k] = exactly(id, load(x[j + k]));
    };
    correct(incoming.token);
    for (int64_t k = 0; k < incoming.choices; ++k)
      correct(incoming.ids[k]);
    // The gradient may lie over logits that were read.
    for (int64_t k = 0; k < n; ++k)
      store(grad + j + k, values[k]);
  }
}

} // namespace

namespace TOKCREDIT_LEVEL {

void logits_rows(const LogitsForward &f, int64_t first, int64_t last) {
  with_float(f.in.type, [&](auto t) {
    for (int64_t i = first; i < last; ++i)
      forward<typename decltype(t)::type>(f, i);
  });
}

void logits_state_rows(const LogitsState &s, int64_t first, int64_t last) {
  with_float(s.in.type, [&](auto t) {
    for (int64_t i = first; i < last; ++i)
      join<typename decltype(t)::type>(s, i);
  });
}

void logits_gradient_rows(const LogitsBackward &b, int64_t first, int64_t last) {
  with_gradient(b, [&](auto t, auto g) {
    for (int64_t i = first; i < last; ++i)
      backward<typename decltype(t)::type, typename decltype(g)::type>(b, i);
  });
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
