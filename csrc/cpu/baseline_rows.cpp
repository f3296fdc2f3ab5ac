#include "cpu/baseline_rows.hpp"
#include "cpu/rows.hpp"
#include "cpu/running.hpp"
#include "math/dispatch.hpp"
#include "math/energy.hpp"

namespace tokcredit::cpu {
namespace {

// Sums over the rows of a group at each offset of a stretch.
struct Sums {
  double weighted[stretch], weight[stretch];
  int32_t rows[stretch];
};

template <class A> struct Stretch {
  uint8_t live[stretch];
  A energy[stretch], to_go[stretch], baseline[stretch];
};

template <class T, class A> struct Group {
  const Baseline &b;
  const T *log_probs = static_cast<const T *>(b.log_probs), *squares = static_cast<const T *>(b.squares),
          *rewards = static_cast<const T *>(b.rewards);
  A *advantages = static_cast<A *>(b.advantages), *returns = static_cast<A *>(b.returns);
  Stretch<A> s{};

  // Rewards from each stretch of the row on.
  void look_ahead(int64_t row, double *to_go) {
    const int64_t begin = b.rows.begin[row], length = b.rows.end[row] - begin;
    int64_t k = (length + stretch - 1) / stretch;
    to_go[k] = 0;
    while (k-- > 0) {
      const int64_t first = begin + k * stretch,
                    n = length - k * stretch < stretch ? length - k * stretch : stretch;
      read_mask(b.rows, first, n, s.live);
      double parts[8] = {};
      for (int64_t i = 0; i < n; ++i)
        s.to_go[i] = s.live[i] ? A(load(rewards[first + i])) : A(0);
      for (int64_t i = n; i < stretch; ++i)
        s.to_go[i] = A(0);
      for (int64_t i = 0; i < stretch; i += 8)
        for (int64_t j = 0; j < 8; ++j)
          parts[j] += double(s.to_go[i + j]);
      to_go[k] = to_go[k + 1];
      for (double part : parts)
        to_go[k] += part;
    }
  }

  // G of n tokens of a row into the results, and what they add to the sums.
  void add(int64_t row, int64_t first, int64_t n, double &energy, double after, Sums &sums) {
    read_mask(b.rows, first, n, s.live);
    for (int64_t i = 0; i < n; ++i) {
      const A own = tokcredit::energy(A(load(log_probs[first + i])), A(load(squares[first + i])));
      s.energy[i] = s.live[i] ? own : A(0);
    }
    if (b.per_row) {
      const A all = load(rewards[row]);
      for (int64_t i = 0; i < n; ++i)
        s.to_go[i] = all;
    } else {
      for (int64_t i = 0; i < n; ++i)
        s.to_go[i] = s.live[i] ? A(load(rewards[first + i])) : A(0);
    }
    for (int64_t i = n; i % at_once; ++i)
      s.energy[i] = s.to_go[i] = A(0);
    energy = run_forward(s.energy, (n + at_once - 1) / at_once * at_once, energy);
    if (!b.per_row)
      run_backward(s.to_go, (n + at_once - 1) / at_once * at_once, after);
    for (int64_t i = 0; i < n; ++i) {
      const double weight = s.live[i] ? double(s.energy[i]) : 0.0;
      const A g = s.live[i] ? s.to_go[i] : A(0);
      sums.weighted[i] += weight * double(g);
      sums.weight[i] += weight;
      sums.rows[i] += s.live[i];
      advantages[first + i] = g;
    }
    if (returns)
      __builtin_memmove(returns + first, advantages + first, n * sizeof(A));
  }

  void walk(const int64_t *members, int64_t count, Course *courses) {
    int64_t longest = 0;
    for (int64_t m = 0; m < count; ++m) {
      const int64_t length = b.rows.end[members[m]] - b.rows.begin[members[m]];
      longest = length > longest ? length : longest;
      courses[m].energy = 0;
      if (!b.per_row)
        look_ahead(members[m], courses[m].to_go);
    }
    for (int64_t from = 0; from < longest; from += stretch) {
      Sums sums{};
      const auto each = [&](auto &&body) {
        for (int64_t m = 0; m < count; ++m) {
          const int64_t first = b.rows.begin[members[m]] + from, left = b.rows.end[members[m]] - first;
          if (left > 0)
            body(m, first, left < stretch ? left : stretch);
        }
      };
      each([&](int64_t m, int64_t first, int64_t n) {
        const double after = b.per_row ? 0 : courses[m].to_go[from / stretch + 1];
        add(members[m], first, n, courses[m].energy, after, sums);
      });
      for (int64_t i = 0; i < stretch; ++i)
        s.baseline[i] = sums.rows[i] > 1 ? A(sums.weighted[i] / (sums.weight[i] + b.epsilon)) : A(0);
      each([&](int64_t, int64_t first, int64_t n) {
        read_mask(b.rows, first, n, s.live);
        for (int64_t i = 0; i < n; ++i)
          advantages[first + i] -= s.live[i] ? s.baseline[i] : A(0);
      });
    }
  }
};

} // namespace

namespace TOKCREDIT_LEVEL {

void baseline_group(const Baseline &b, const int64_t *members, int64_t count, Course *courses) {
  with_float(b.type, [&](auto t) {
    using T = typename decltype(t)::type;
    Group<T, accumulate_t<T>>{b}.walk(members, count, courses);
  });
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
