#include "cpu/divergence_rows.hpp"
#include "cpu/blocks.hpp"
#include "cpu/mixture.hpp"
#include "math/divergence.hpp"

namespace tokcredit::cpu {
namespace {

// Exponentials are powers of 2 in float, which take fewer steps, and of e in double.
template <class A> constexpr double log_base = std::is_same_v<A, float> ? 0.6931471805599453 : 1;
template <class A> constexpr A lowest_power = std::is_same_v<A, float> ? A(-127) : lowest<A>; // 0

template <class A> TOKCREDIT_FN Pack<A> power(const Pack<A> &x) {
  if constexpr (std::is_same_v<A, float>)
    return power_of_two_from(x);
  else
    return exponential(x);
}

// The logits of one row of both, of any type that is summed in A; the teacher's may be a mixture of two.
template <class A> struct Row {
  Type type;
  const char *student, *teacher, *other;
  A weight;
  int64_t size;

  Row(const DivergenceRows &in, int64_t i) : type(in.type), size(in.vocabulary) {
    const int64_t at = i * size * bytes_of(type);
    student = static_cast<const char *>(in.student) + at;
    teacher = static_cast<const char *>(in.teacher) + at;
    weight = in.other ? static_cast<const A *>(in.weights)[i] : A(0);
    other = weight == A(0) ? nullptr : static_cast<const char *>(in.other) + at;
  }

  // Whether n numbers are packs of A where they are.
  bool is_plain(int64_t n) const { return bytes_of(type) == sizeof(A) && n % lanes == 0; }

  // n numbers from the i-th, and -inf to the end of a pack: where they are, or read into `memory`.
  const A *read_from(const char *logits, int64_t i, int64_t n, A *memory) const {
    if (is_plain(n))
      return reinterpret_cast<const A *>(logits) + i;
    with_summed_in<A>(type, [&](auto t) {
      read(reinterpret_cast<const typename decltype(t)::type *>(logits) + i, n, A(-INFINITY), memory);
    });
    return memory;
  }
  const A *read_teacher(int64_t i, int64_t n, A *memory) const {
    const A *given = read_from(teacher, i, n, memory);
    if (!other)
      return given;
    A further[block];
    const A *from = read_from(other, i, n, further);
    for (int64_t k = 0; k < n; k += lanes)
      mixed(Pack<A>(given + k), Pack<A>(from + k), Pack<A>(weight)).store(memory + k, lanes);
    return memory;
  }

  A student_at(int64_t j) const { return at(student, j); }
  A teacher_at(int64_t j) const {
    const A given = at(teacher, j);
    return other ? mixed(given, at(other, j), weight) : given;
  }

  // Calls body(i, n, student, teacher) with blocks of n logits.
  template <class Body> void each_block(Body &&body) const {
    A s[block], t[block];
    for (int64_t i = 0; i < size; i += block) {
      const int64_t n = size - i < block ? size - i : block;
      body(i, n, read_from(student, i, n, s), read_teacher(i, n, t));
    }
  }

private:
  A at(const char *logits, int64_t j) const {
    A out;
    with_summed_in<A>(
        type, [&](auto t) { out = load(reinterpret_cast<const typename decltype(t)::type *>(logits)[j]); });
    return out;
  }
};

// Sums over the logits of one distribution, relative to the largest so far: d = (x - most) / temperature. The
// first leaves out one logit that is the largest: where its probability is close to 1, the others keep digits
// that 1 + others would lose.
template <class A> struct Sums {
  A most = A(-INFINITY);
  int64_t at = -1;                                 // of the one that is left out; -1: every logit was -inf
  double others = 0, weighted = 0, difference = 0; // of exp(d), of exp(d) * d, of exp(d) * between

  // Looks for a larger logit in a block of n, the i-th and after.
  void raise(int64_t i, int64_t n, const A *values, double inverse) {
    const A top = largest_of(values, n);
    if (!(most < top))
      return;
    if (at >= 0) {
      const double d = (double(most) - double(top)) * inverse, factor = std::exp(d);
      weighted = factor * (weighted + d * (1 + others));
      difference = factor > 0 ? factor * difference : 0;
      others = factor * (1 + others);
    }
    most = top;
    at = i + place_of(top, values);
  }

  A base() const { return at < 0 ? A(0) : most; }
  bool in_pack(int64_t j) const { return at >= j && at < j + lanes; }
  double log_sum() const { return std::log1p(others); }
  double logsumexp(double inverse) const { return double(most) * inverse + log_sum(); }
};

template <class A> struct Both {
  Sums<A> student, teacher;
  A apart = A(0); // see offset()

  bool in_pack(int64_t j) const { return student.in_pack(j) || teacher.in_pack(j); }
};

// Whether a first pass over the logits keeps the exponentials for the second.
template <Divergence kind, class A> constexpr bool keeps = has_mixture(kind) && std::is_same_v<A, float>;

// Exponentials of both distributions, the logits' difference less `apart`, and what the exponentials of each
// block are relative to.
template <class A> struct Kept {
  A *student{}, *teacher{}, *between{}, *bases{};

  Kept() = default;
  Kept(A *memory, int64_t vocabulary)
      : student(memory), teacher(student + padded(vocabulary)), between(teacher + padded(vocabulary)),
        bases(between + padded(vocabulary)) {}

  static int64_t size(int64_t vocabulary) { return 3 * padded(vocabulary) + 2 * (vocabulary / block + 1); }

private:
  static int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }
};

// One pack where an element is the largest of its distribution, number by number in double.
template <Divergence kind, class A>
void add_exactly(Both<A> &sums, const Kept<A> &kept, int64_t j, int64_t n, const A *s, const A *t,
                 double inverse) {
  Sums<A> &student = sums.student, &teacher = sums.teacher;
  for (int64_t k = 0; k < n; ++k) {
    const double d = (double(s[k]) - double(student.base())) * inverse;
    const double own = std::exp(d), given = std::exp((double(t[k]) - double(teacher.base())) * inverse);
    const double between = (double(t[k]) - double(s[k]) - double(sums.apart)) * inverse;
    if constexpr (keeps<kind, A>) {
      kept.student[j + k] = A(own);
      kept.teacher[j + k] = A(given);
      kept.between[j + k] = t[k] - (s[k] + sums.apart);
    }
    if (j + k != student.at)
      student.others += own;
    if (j + k != teacher.at)
      teacher.others += given;
    if (own > 0)
      student.weighted += own * d;
    if (kind == Divergence::forward_kl && given > 0)
      teacher.difference += given * between;
    if (kind == Divergence::reverse_kl && own > 0)
      student.difference += own * between;
  }
}

template <class A> double total(const Pack<A> &x) {
  double all[lanes] = {}, sum = 0;
  x.add_to(all);
  for (const double each : all)
    sum += each;
  return sum;
}

template <Divergence kind, class A> Both<A> sums_of(const Row<A> &row, const Kept<A> &kept, double inverse) {
  Both<A> sums;
  Sums<A> &student = sums.student, &teacher = sums.teacher;
  const A scale = A(inverse), power_scale = A(inverse / log_base<A>);
  const Pack<A> low = lowest_power<A>;
  bool met = false;
  row.each_block([&](int64_t i, int64_t n, const A *s, const A *t) {
    student.raise(i, n, s, inverse);
    teacher.raise(i, n, t, inverse);
    if (!met && student.at >= 0 && teacher.at >= 0) {
      sums.apart = offset(teacher.most - student.most);
      met = true;
    }
    const A s_base = student.base(), t_base = teacher.base(), apart = sums.apart;
    if constexpr (keeps<kind, A>) {
      kept.bases[2 * (i / block)] = student.most;
      kept.bases[2 * (i / block) + 1] = teacher.most;
    }
    Pack<A> s_own{}, t_own{}, w_own{}, b_own{};
    for (int64_t k = 0; k < n; k += lanes) {
      // The exact one is outside of this loop: a call in it would take the constants out of the registers.
      for (; k < n && !sums.in_pack(i + k); k += lanes) {
        const Pack<A> x(s + k), y(t + k);
        const Pack<A> d = at_least((x - s_base) * power_scale, low), own = power(d);
        const Pack<A> given = power(at_least((y - t_base) * power_scale, low));
        s_own = s_own + own;
        t_own = t_own + given;
        w_own = w_own + own * d;
        if constexpr (keeps<kind, A>) {
          own.store(kept.student + i + k, lanes);
          given.store(kept.teacher + i + k, lanes);
          (y - (x + apart)).store(kept.between + i + k, lanes);
        }
        if constexpr (!has_mixture(kind)) {
          const Pack<A> between = (y - (x + apart)) * scale;
          const Pack<A> &factor = kind == Divergence::forward_kl ? given : own;
          b_own = b_own + choose(factor > Pack<A>{}, factor * between, Pack<A>{});
        }
      }
      if (k < n)
        add_exactly<kind>(sums, kept, i + k, n - k < lanes ? n - k : lanes, s + k, t + k, inverse);
    }
    student.others += total(s_own);
    student.weighted += total(w_own) * log_base<A>;
    teacher.others += total(t_own);
    (kind == Divergence::forward_kl ? teacher : student).difference += total(b_own);
  });
  return sums;
}

// q - p, from half of log q - log p where they are close: that keeps its digits.
TOKCREDIT_FN Pack<float> difference(const Pack<float> &p, const Pack<float> &q, const Pack<float> &half) {
  const Pack<float> square = half * half;
  // (q - p) / (q + p) = tanh(half)
  return choose(square < Pack<float>(1.0f / 1024), (p + q) * (half * (square * (-1.0f / 3) + 1.0f)), q - p);
}

// (q - p) / m, 0 where both are
TOKCREDIT_FN Pack<float> by_mixture(const Pack<float> &d, const Pack<float> &p, const Pack<float> &q,
                                    float share) {
  return d / at_least(q * share + p * (1 - share), Pack<float>(1e-37f));
}

// Those of mixture_terms, from what the first pass kept.
template <Divergence kind>
Terms<double> kept_terms(const Row<float> &row, const Both<float> &sums, const Kept<float> &kept,
                         const LogProbs<float> &logs, const MixtureLogs &mixture, double share) {
  constexpr bool js = kind == Divergence::js;
  const double inverse = 1 / logs.by;
  const float by = logs.inverse / 2,
              rest = float((logs.teacher - logs.student - double(sums.apart) * inverse) / 2);
  Terms<double> out{0, 0};
  for (int64_t i = 0; i < row.size; i += block) {
    const int64_t end = row.size - i < block ? row.size : i + block;
    // What makes probabilities of the exponentials: for JS, of their sums.
    const double s_scale = std::exp(double(kept.bases[2 * (i / block)]) * inverse - logs.student),
                 t_scale = std::exp(double(kept.bases[2 * (i / block) + 1]) * inverse - logs.teacher);
    Pack<float> to_q{}, to_p{}, apart{}, excess{};
    for (int64_t j = i; j < end; j += lanes) {
      for (; j < end && !sums.in_pack(j); j += lanes) {
        const Pack<float> half = Pack<float>(kept.between + j) * by - rest;
        const MixtureLogs::Logs of = mixture.of(half);
        Pack<float> p(kept.student + j), q(kept.teacher + j);
        if constexpr (!js) {
          p = p * float(s_scale);
          q = q * float(t_scale);
          const Pack<float> d = difference(p, q, half);
          apart = apart + d;
          excess = excess + p * by_mixture(d, p, q, float(share));
        }
        if constexpr (kind != Divergence::skew_forward)
          to_p = to_p + p * of.m_by_p;
        if constexpr (kind != Divergence::skew_reverse)
          to_q = to_q + q * of.q_by_m;
      }
      for (int64_t k = j; k < end && k < j + lanes; ++k)
        add_exact_terms<kind>(out, logs, row.student_at(k), row.teacher_at(k), share);
    }
    if constexpr (js) {
      const double kl = -s_scale * total(to_p);
      out.value += share * t_scale * total(to_q) + (1 - share) * kl;
      out.slope += kl;
    } else if constexpr (kind == Divergence::skew_forward) {
      out.value += total(to_q) - (1 - share) * total(apart);
      out.slope += (1 - share) * total(excess);
    } else {
      out.value += share * total(apart) - total(to_p);
      out.slope += share * (1 - share) * total(excess) - total(to_p);
    }
  }
  return out;
}

// The value and the sum of slopes of a divergence from a mixture.
template <Divergence kind, class A>
Terms<double> mixture_terms(const Row<A> &row, const LogProbs<A> &logs, double share) {
  double v_all[lanes] = {}, c_all[lanes] = {};
  Terms<double> out{0, 0};
  row.each_block([&](int64_t, int64_t n, const A *s, const A *t) {
    Pack<A> v_own{}, c_own{};
    for (int64_t k = 0; k < n; k += lanes) {
      for (; k < n; k += lanes) {
        const Pack<A> x(s + k), y(t + k);
        const Pack<A> log_p = logs.log_p(x), log_q = logs.log_q(y);
        if (any(is_large(log_p, log_q)))
          break;
        const auto terms = divergence_terms<kind>(log_p, log_q, logs.delta(x, y), A(share));
        v_own = v_own + terms.value;
        c_own = c_own + terms.slope;
      }
      for (int64_t j = k; j < n && j < k + lanes; ++j)
        add_exact_terms<kind>(out, logs, s[j], t[j], share);
    }
    v_own.add_to(v_all);
    c_own.add_to(c_all);
  });
  for (int64_t k = 0; k < lanes; ++k) {
    out.value += v_all[k];
    out.slope += c_all[k];
  }
  return out;
}

template <Divergence kind, class A>
void forward(const DivergenceForward &f, const MixtureLogs &mixture, A *memory, int64_t i) {
  const double inverse = 1 / f.in.temperature;
  double value = 0, entropy = 0, *saved = f.saved + i * saved_of_divergence;
  saved[0] = saved[1] = saved[2] = 0;
  if (!f.in.mask || f.in.mask[i]) {
    const Row<A> row(f.in, i);
    const Kept<A> kept = keeps<kind, A> ? Kept<A>(memory, f.in.vocabulary) : Kept<A>();
    const Both<A> sums = sums_of<kind>(row, kept, inverse);
    const Sums<A> &student = sums.student, &teacher = sums.teacher;
    saved[0] = student.logsumexp(inverse);
    saved[1] = teacher.logsumexp(inverse);
    entropy = student.log_sum() - student.weighted / (1 + student.others);
    if (!std::isfinite(saved[0] + saved[1])) {
      value = entropy = saved[0] = saved[1] = saved[2] = double(NAN);
    } else if constexpr (has_mixture(kind)) {
      const LogProbs<A> logs(saved, f.in.temperature);
      Terms<double> terms;
      if constexpr (keeps<kind, A>)
        terms = mixture.covers(f.in.share) ? kept_terms<kind>(row, sums, kept, logs, mixture, f.in.share)
                                           : mixture_terms<kind>(row, logs, f.in.share);
      else
        terms = mixture_terms<kind>(row, logs, f.in.share);
      value = terms.value;
      saved[2] = terms.slope;
    } else {
      // The mean of log q - log p is that of what was summed, and this.
      const double off = (double(sums.apart) - (double(teacher.most) - double(student.most))) * inverse +
                         student.log_sum() - teacher.log_sum();
      if constexpr (kind == Divergence::forward_kl)
        value = teacher.difference / (1 + teacher.others) + off;
      else
        value = -student.difference / (1 + student.others) - off;
      saved[2] = value;
    }
  }
  static_cast<A *>(f.values)[i] = A(value);
  static_cast<A *>(f.entropies)[i] = A(entropy);
}

// The slopes of packs without a probability above 1/2, by definition.
template <Divergence kind, class A> struct DefinedSlopes {
  const LogProbs<A> &logs;
  A share, sum;

  Pack<A> operator()(const Pack<A> &s, const Pack<A> &t) const {
    return divergence_slope<kind>(logs.log_p(s), logs.log_q(t), logs.delta(s, t), share, Pack<A>(sum));
  }
};

// The same in float, in fewer steps.
template <Divergence kind> struct QuickSlopes {
  const MixtureLogs &mixture;
  float power_scale, by, share, sum;
  Shift<float> p, q, between;

  QuickSlopes(const LogProbs<float> &logs, const MixtureLogs &mixture, double share, double sum)
      : mixture(mixture), power_scale(float(1 / (logs.by * log_base<float>))), by(logs.inverse / 2),
        share(float(share)), sum(float(sum)), p(logs.p), q(logs.q), between(logs.between) {
    p.rest = float(double(p.rest) / log_base<float>);
    q.rest = float(double(q.rest) / log_base<float>);
    between.rest /= 2;
  }

  Pack<float> operator()(const Pack<float> &s, const Pack<float> &t) const {
    const Pack<float> half = (t - (s + between.center)) * by - between.rest, own = probability(s, p);
    if constexpr (kind == Divergence::reverse_kl)
      return choose(own > Pack<float>{}, -(own * (half + half + sum)), Pack<float>{});
    else if constexpr (kind == Divergence::js)
      return own * (mixture.of(half).m_by_p + sum) * (share - 1);
    else {
      const Pack<float> given = probability(t, q), d = difference(own, given, half);
      if constexpr (kind == Divergence::forward_kl)
        return -d;
      else if constexpr (kind == Divergence::skew_forward)
        return own * (sum - by_mixture(d, own, given, share) * (1 - share)) * (1 - share);
      else
        return own *
               (by_mixture(d, own, given, share) * (share * (1 - share)) - mixture.of(half).m_by_p - sum);
    }
  }

private:
  Pack<float> probability(const Pack<float> &x, const Shift<float> &by) const {
    return power(at_least((x - by.center) * power_scale - by.rest, Pack<float>(lowest_power<float>)));
  }
};

template <Divergence kind, class A, class Slopes>
void write_slopes(const DivergenceBackward &b, int64_t i, const LogProbs<A> &logs, const Slopes &slopes,
                  double sum, double factor) {
  char *grad = static_cast<char *>(b.grad) + i * b.in.vocabulary * bytes_of(b.in.type);
  const Row<A> row(b.in, i);
  row.each_block([&](int64_t j, int64_t n, const A *s, const A *t) {
    A memory[block];
    A *out = row.is_plain(n) ? reinterpret_cast<A *>(grad) + j : memory;
    for (int64_t k = 0; k < n; k += lanes) {
      for (; k < n; k += lanes) {
        const Pack<A> x(s + k), y(t + k);
        if (any(is_large(logs.log_p(x), logs.log_q(y))))
          break;
        (slopes(x, y) * A(factor)).store(out + k, lanes);
      }
      for (int64_t l = k; l < n && l < k + lanes; ++l)
        out[l] = A(factor * exact_slope<kind>(logs, s[l], t[l], b.in.share, sum));
    }
    if (out != memory)
      return;
    with_summed_in<A>(b.in.type, [&](auto t) {
      auto *narrow = reinterpret_cast<typename decltype(t)::type *>(grad) + j;
      for (int64_t k = 0; k < n; ++k)
        store(narrow + k, out[k]);
    });
  });
}

template <Divergence kind, class A>
void backward(const DivergenceBackward &b, const MixtureLogs &mixture, int64_t i) {
  const int64_t bytes = b.in.vocabulary * bytes_of(b.in.type);
  const double given = double(static_cast<const A *>(b.grad_values)[i]) / b.in.temperature;
  if ((b.in.mask && !b.in.mask[i]) || given == 0) {
    __builtin_memset(static_cast<char *>(b.grad) + i * bytes, 0, bytes);
    return;
  }
  const double *saved = b.saved + i * saved_of_divergence;
  const double factor = std::isfinite(saved[0] + saved[1] + saved[2]) ? given : double(NAN), sum = saved[2];
  const LogProbs<A> logs(saved, b.in.temperature);
  if constexpr (std::is_same_v<A, float>)
    if (!has_mixture(kind) || mixture.covers(b.in.share))
      return write_slopes<kind>(b, i, logs, QuickSlopes<kind>(logs, mixture, b.in.share, sum), sum, factor);
  if constexpr (std::is_same_v<A, double> || has_mixture(kind))
    write_slopes<kind>(b, i, logs, DefinedSlopes<kind, A>{logs, A(b.in.share), A(sum)}, sum, factor);
}

} // namespace

namespace TOKCREDIT_LEVEL {

void divergence_rows(const DivergenceForward &f, int64_t first, int64_t last, float *memory) {
  const MixtureLogs mixture(f.in.share);
  with_divergence(f.in.kind, [&](auto kind) {
    for (int64_t i = first; i < last; ++i)
      f.in.type == Type::f64 ? forward<decltype(kind)::value, double>(f, mixture, nullptr, i)
                             : forward<decltype(kind)::value, float>(f, mixture, memory, i);
  });
}

void divergence_gradient_rows(const DivergenceBackward &b, int64_t first, int64_t last) {
  const MixtureLogs mixture(b.in.share);
  with_divergence(b.in.kind, [&](auto kind) {
    for (int64_t i = first; i < last; ++i)
      b.in.type == Type::f64 ? backward<decltype(kind)::value, double>(b, mixture, i)
                             : backward<decltype(kind)::value, float>(b, mixture, i);
  });
}

int64_t floats_of_divergence(const DivergenceRows &in) {
  return has_mixture(in.kind) && in.type != Type::f64 ? Kept<float>::size(in.vocabulary) : 0;
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
