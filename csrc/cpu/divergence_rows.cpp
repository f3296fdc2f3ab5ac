#include "cpu/divergence_rows.hpp"
#include "cpu/blocks.hpp"
#include "math/divergence.hpp"

namespace tokcredit::cpu {
namespace {

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

  // Calls body(i, n, student, teacher) with blocks of n logits.
  template <class Body> void each_block(Body &&body) const {
    A s[block], t[block];
    for (int64_t i = 0; i < size; i += block) {
      const int64_t n = size - i < block ? size - i : block;
      body(i, n, read_from(student, i, n, s), read_teacher(i, n, t));
    }
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
};

// One pack where an element is the largest of its distribution, number by number in double.
template <Divergence kind, class A>
void add_exactly(Both<A> &sums, int64_t j, int64_t n, const A *s, const A *t, double inverse) {
  Sums<A> &student = sums.student, &teacher = sums.teacher;
  for (int64_t k = 0; k < n; ++k) {
    const double d = (double(s[k]) - double(student.base())) * inverse;
    const double own = std::exp(d), given = std::exp((double(t[k]) - double(teacher.base())) * inverse);
    const double between = (double(t[k]) - double(s[k]) - double(sums.apart)) * inverse;
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

template <Divergence kind, class A> Both<A> sums_of(const Row<A> &row, double inverse) {
  Both<A> sums;
  Sums<A> &student = sums.student, &teacher = sums.teacher;
  const A scale = A(inverse);
  bool met = false;
  row.each_block([&](int64_t i, int64_t n, const A *s, const A *t) {
    student.raise(i, n, s, inverse);
    teacher.raise(i, n, t, inverse);
    if (!met && student.at >= 0 && teacher.at >= 0) {
      sums.apart = offset(teacher.most - student.most);
      met = true;
    }
    const A s_base = student.base(), t_base = teacher.base(), apart = sums.apart;
    Pack<A> s_own{}, t_own{}, w_own{}, b_own{};
    for (int64_t k = 0; k < n; k += lanes) {
      // The exact one is outside of this loop: a call in it would take the constants out of the registers.
      for (; k < n && !student.in_pack(i + k) && !teacher.in_pack(i + k); k += lanes) {
        const Pack<A> x(s + k), y(t + k);
        const Pack<A> d = at_least((x - s_base) * scale, Pack<A>(lowest<A>));
        const Pack<A> own = exponential(d), given = exponential((y - t_base) * scale);
        s_own = s_own + own;
        t_own = t_own + given;
        w_own = w_own + own * d;
        if constexpr (!has_mixture(kind)) {
          const Pack<A> between = (y - (x + apart)) * scale;
          const Pack<A> &factor = kind == Divergence::forward_kl ? given : own;
          b_own = b_own + choose(factor > Pack<A>{}, factor * between, Pack<A>{});
        }
      }
      if (k < n)
        add_exactly<kind>(sums, i + k, n - k < lanes ? n - k : lanes, s + k, t + k, inverse);
    }
    student.others += total(s_own);
    student.weighted += total(w_own);
    teacher.others += total(t_own);
    (kind == Divergence::forward_kl ? teacher : student).difference += total(b_own);
  });
  return sums;
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

template <Divergence kind, class A> void forward(const DivergenceForward &f, int64_t i) {
  const double inverse = 1 / f.in.temperature;
  double value = 0, entropy = 0, *saved = f.saved + i * saved_of_divergence;
  saved[0] = saved[1] = saved[2] = 0;
  if (!f.in.mask || f.in.mask[i]) {
    const Row<A> row(f.in, i);
    const Both<A> sums = sums_of<kind>(row, inverse);
    const Sums<A> &student = sums.student, &teacher = sums.teacher;
    saved[0] = student.logsumexp(inverse);
    saved[1] = teacher.logsumexp(inverse);
    entropy = student.log_sum() - student.weighted / (1 + student.others);
    if (!std::isfinite(saved[0] + saved[1])) {
      value = entropy = saved[0] = saved[1] = saved[2] = double(NAN);
    } else if constexpr (has_mixture(kind)) {
      const Terms<double> terms = mixture_terms<kind>(row, LogProbs<A>(saved, f.in.temperature), f.in.share);
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

template <Divergence kind, class A> void backward(const DivergenceBackward &b, int64_t i) {
  const int64_t bytes = b.in.vocabulary * bytes_of(b.in.type);
  char *grad = static_cast<char *>(b.grad) + i * bytes;
  const double given = double(static_cast<const A *>(b.grad_values)[i]) / b.in.temperature;
  if ((b.in.mask && !b.in.mask[i]) || given == 0) {
    __builtin_memset(grad, 0, bytes);
    return;
  }
  const double *saved = b.saved + i * saved_of_divergence;
  const double factor = std::isfinite(saved[0] + saved[1] + saved[2]) ? given : double(NAN),
               share = b.in.share;
  const LogProbs<A> logs(saved, b.in.temperature);
  const Row<A> row(b.in, i);
  row.each_block([&](int64_t j, int64_t n, const A *s, const A *t) {
    A memory[block];
    A *out = row.is_plain(n) ? reinterpret_cast<A *>(grad) + j : memory;
    for (int64_t k = 0; k < n; k += lanes) {
      for (; k < n; k += lanes) {
        const Pack<A> x(s + k), y(t + k);
        const Pack<A> log_p = logs.log_p(x), log_q = logs.log_q(y);
        if (any(is_large(log_p, log_q)))
          break;
        const Pack<A> slope =
            divergence_slope<kind>(log_p, log_q, logs.delta(x, y), A(share), Pack<A>(A(saved[2])));
        (slope * A(factor)).store(out + k, lanes);
      }
      for (int64_t l = k; l < n && l < k + lanes; ++l)
        out[l] = A(factor * exact_slope<kind>(logs, s[l], t[l], share, saved[2]));
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

} // namespace

namespace TOKCREDIT_LEVEL {

void divergence_rows(const DivergenceForward &f, int64_t first, int64_t last) {
  with_divergence(f.in.kind, [&](auto kind) {
    for (int64_t i = first; i < last; ++i)
      f.in.type == Type::f64 ? forward<decltype(kind)::value, double>(f, i)
                             : forward<decltype(kind)::value, float>(f, i);
  });
}

void divergence_gradient_rows(const DivergenceBackward &b, int64_t first, int64_t last) {
  with_divergence(b.in.kind, [&](auto kind) {
    for (int64_t i = first; i < last; ++i)
      b.in.type == Type::f64 ? backward<decltype(kind)::value, double>(b, i)
                             : backward<decltype(kind)::value, float>(b, i);
  });
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
