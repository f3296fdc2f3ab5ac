#include "cpu/divergence_top_rows.hpp"
#include "cpu/blocks.hpp"
#include "math/divergence_top.hpp"

namespace tokcredit::cpu {
namespace {

// The distinct ids of a row, their logits and the places where they were given.
struct Ids {
  int64_t id[most_top], place[most_top], count = 0;
  double logit[most_top];

  Ids(const TopRows &in, int64_t i) {
    for (int64_t a = 0; a < in.top; ++a) {
      const int64_t own = id_at(in, i * in.top + a);
      bool seen = own < 0;
      for (int64_t b = 0; b < count && !seen; ++b)
        seen = id[b] == own;
      if (!seen) {
        id[count] = own;
        place[count++] = a;
      }
    }
  }

  int64_t find(int64_t own) const {
    int64_t at = 0;
    while (id[at] != own)
      ++at;
    return at;
  }
};

// The block of a row that begins with its i-th logit; returns how many it has.
template <class A> int64_t read_block(const TopRows &in, int64_t row, int64_t i, A *values) {
  const int64_t n = in.vocabulary - i < block ? in.vocabulary - i : block;
  const char *x = static_cast<const char *>(in.student) + row * in.vocabulary * bytes_of(in.type);
  with_summed_in<A>(in.type, [&](auto t) {
    read(reinterpret_cast<const typename decltype(t)::type *>(x) + i, n, A(-INFINITY), values);
  });
  return n;
}

// Calls body(i, n, values) with blocks of n logits.
template <class A, class Body> void each_block(const TopRows &in, int64_t row, Body &&body) {
  A values[block];
  for (int64_t i = 0; i < in.vocabulary; i += block) {
    const int64_t n = read_block(in, row, i, values);
    body(i, n, values);
  }
}

// The largest logit, and where it is first; -1 where every logit is -inf.
template <class A> struct Peak {
  A most = A(-INFINITY);
  int64_t at = -1;
};

template <class A> Peak<A> peak_of(const TopRows &in, int64_t row) {
  Peak<A> peak;
  each_block<A>(in, row, [&](int64_t i, int64_t n, const A *values) {
    const A here = largest_of(values, n);
    if (peak.most < here)
      peak = {here, i + place_of(here, values)};
  });
  return peak;
}

// Sums of exp(d) and exp(d) * d over the logits outside of the ids, d = (x - most) / temperature; the first
// leaves out the largest logit.
struct Rest {
  double others = 0, weighted = 0;
  bool has_most;
};

template <class A> Rest rest_of(const TopRows &in, int64_t row, Ids &ids, const Peak<A> &peak) {
  const A scale = A(1 / in.temperature);
  double e_all[lanes] = {}, w_all[lanes] = {};
  Rest rest{0, 0, true};
  each_block<A>(in, row, [&](int64_t i, int64_t n, A *values) {
    for (int64_t a = 0; a < ids.count; ++a)
      if (ids.id[a] >= i && ids.id[a] < i + n) {
        ids.logit[a] = double(values[ids.id[a] - i]);
        values[ids.id[a] - i] = A(-INFINITY);
        rest.has_most = rest.has_most && ids.id[a] != peak.at;
      }
    if (peak.at >= i && peak.at < i + n)
      values[peak.at - i] = A(-INFINITY);
    Pack<A> e_own{}, w_own{};
    for (int64_t k = 0; k < n; k += lanes) {
      Pack<A> d = (Pack<A>(values + k) - peak.most) * scale;
      d = choose(d < lowest<A>, Pack<A>(lowest<A>), d);
      const Pack<A> e = exponential(d);
      e_own = e_own + e;
      w_own = w_own + e * d;
    }
    e_own.add_to(e_all);
    w_own.add_to(w_all);
  });
  for (int64_t k = 0; k < lanes; ++k) {
    rest.others += e_all[k];
    rest.weighted += w_all[k];
  }
  return rest;
}

template <class A> void forward(const DivergenceTopForward &f, int64_t i) {
  const TopRows &in = f.in;
  const double inverse = 1 / in.temperature;
  double value = 0, entropy = 0, *saved = f.saved + 2 * i, *slopes = f.slopes + i * in.top;
  saved[0] = saved[1] = 0;
  for (int64_t a = 0; a < in.top; ++a)
    slopes[a] = 0;
  if (!in.mask || in.mask[i]) {
    Ids ids(in, i);
    const Peak<A> peak = peak_of<A>(in, i);
    const Rest rest = rest_of(in, i, ids, peak);
    double others = rest.others, weighted = rest.weighted;
    for (int64_t a = 0; a < ids.count; ++a) {
      const double d = (ids.logit[a] - double(peak.most)) * inverse, e = std::exp(d);
      others += ids.id[a] == peak.at ? 0 : e;
      weighted += e > 0 ? e * d : 0;
    }
    const double log_sum = std::log1p(others);
    saved[0] = double(peak.most) * inverse + log_sum;
    entropy = log_sum - weighted / (1 + others);
    if (!std::isfinite(saved[0]))
      saved[0] = entropy = double(NAN);
    const auto log_p = [&](int64_t a) { return ids.logit[a] * inverse - saved[0]; };
    const auto log_q = [&](int64_t a) {
      return double(static_cast<const A *>(f.log_probs)[i * in.top + ids.place[a]]);
    };
    double p_inside = 0, q_inside = 0;
    for (int64_t a = 0; a < ids.count; ++a) {
      p_inside += std::exp(log_p(a));
      q_inside += std::exp(log_q(a));
    }
    const double outside = rest.others + (rest.has_most ? 1 : 0);
    const Outcomes outcomes(f.outside, f.share, p_inside, q_inside, std::log(outside) - log_sum);
    with_divergence(f.kind, [&](auto kind) {
      constexpr Divergence of = decltype(kind)::value;
      Terms<double> sum{0, 0};
      for (int64_t a = 0; a < ids.count; ++a) {
        const Terms<double> one = outcomes.terms<of>(log_p(a), log_q(a));
        sum.value += one.value;
        sum.slope += one.slope;
      }
      sum = outcomes.total<of>(sum);
      value = std::isfinite(saved[0]) ? sum.value : double(NAN);
      const double none = std::isfinite(value) ? 0 : double(NAN);
      for (int64_t a = 0; a < ids.count; ++a)
        slopes[ids.place[a]] = outcomes.slope<of>(log_p(a), log_q(a), sum.slope) + none;
      saved[1] = outcomes.slope_outside<of>(sum.slope) + none;
    });
    // An id that is given again has the slope of the first.
    for (int64_t a = 0; a < in.top; ++a) {
      const int64_t id = id_at(in, i * in.top + a);
      if (id >= 0)
        slopes[a] = slopes[ids.place[ids.find(id)]];
    }
  }
  static_cast<A *>(f.values)[i] = A(value);
  static_cast<A *>(f.entropies)[i] = A(entropy);
}

template <class A> void backward(const DivergenceTopBackward &b, int64_t i) {
  const TopRows &in = b.in;
  const int64_t bytes = in.vocabulary * bytes_of(in.type);
  char *grad = static_cast<char *>(b.grad) + i * bytes;
  const double given = double(static_cast<const A *>(b.grad_values)[i]) / in.temperature;
  if ((in.mask && !in.mask[i]) || given == 0) {
    __builtin_memset(grad, 0, bytes);
    return;
  }
  const double logsumexp = b.saved[2 * i], *slopes = b.slopes + i * in.top;
  const A factor = A(given * b.saved[2 * i + 1]), inverse = A(1 / in.temperature);
  const Shift<A> off(A(logsumexp * in.temperature), logsumexp, in.temperature);
  const auto written = [&](int64_t j, int64_t n, const A *values) {
    with_summed_in<A>(in.type, [&](auto t) {
      auto *out = reinterpret_cast<typename decltype(t)::type *>(grad) + j;
      for (int64_t k = 0; k < n; ++k)
        store(out + k, values[k]);
    });
  };
  each_block<A>(in, i, [&](int64_t j, int64_t n, A *values) {
    for (int64_t k = 0; k < n; k += lanes) {
      const Pack<A> p = exponential((Pack<A>(values + k) - off.center) * inverse - off.rest);
      (p * factor).store(values + k, lanes);
    }
    written(j, n, values);
  });
  for (int64_t a = 0; a < in.top; ++a) {
    const int64_t id = id_at(in, i * in.top + a);
    const A slope = A(given * slopes[a]);
    if (id >= 0)
      written(id, 1, &slope);
  }
}

} // namespace

namespace TOKCREDIT_LEVEL {

void divergence_top_rows(const DivergenceTopForward &f, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i)
    f.in.type == Type::f64 ? forward<double>(f, i) : forward<float>(f, i);
}

void divergence_top_gradient_rows(const DivergenceTopBackward &b, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i)
    b.in.type == Type::f64 ? backward<double>(b, i) : backward<float>(b, i);
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
