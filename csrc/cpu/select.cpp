#include "ops/select.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "math/dispatch.hpp"
#include "math/order.hpp"
#include "math/variance.hpp"
#include <array>
#include <limits>
#include <numeric>
#include <vector>

namespace tokcredit::cpu {
namespace {

// Rows of each scope, in order.
struct Scopes {
  std::vector<int64_t> start, row;

  Scopes(const int64_t *scope, int64_t rows, int64_t scopes) : start(scopes + 1, 0) {
    const auto inside = [&](int64_t r) { return scope[r] >= 0 && scope[r] < scopes; };
    for (int64_t r = 0; r < rows; ++r)
      if (inside(r))
        ++start[scope[r] + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    row.resize(start.back());
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t r = 0; r < rows; ++r)
      if (inside(r))
        row[next[scope[r]]++] = r;
  }
};

constexpr int digit_bits = 11;
using Histogram = std::array<int64_t, 1 << digit_bits>;

template <class T> struct Scope {
  using A = accumulate_t<T>;
  using Key = decltype(order_key(A{}));
  const Select &s;
  const int64_t *row;
  int64_t rows;

  template <class Body> void tokens(int64_t first, int64_t last, Body &&body) const {
    const T *x = static_cast<const T *>(s.x);
    for (int64_t i = first; i < last; ++i)
      for (int64_t t = s.rows.begin[row[i]]; t < s.rows.end[row[i]]; ++t)
        if (!s.rows.mask || s.rows.mask[t])
          body(t, order_key(A(load(x[t]))));
  }

  // Integer counts add up to the same in any order, so each chunk adds its own when it is done.
  Histogram histogram(Key prefix, Key known, int shift, int threads) const {
    Histogram total{};
    std::mutex guard;
    parallel(rows, row_grain(s.rows.count, s.rows.size), threads, [&](int64_t first, int64_t last) {
      Histogram own{};
      tokens(first, last, [&](int64_t, Key k) {
        if ((k & known) == prefix)
          ++own[size_t((k >> shift) & ((1 << digit_bits) - 1))];
      });
      std::lock_guard<std::mutex> lock(guard);
      for (size_t d = 0; d < own.size(); ++d)
        total[d] += own[d];
    });
    return total;
  }

  // The key of `rank` (from the largest, counted from 0). `above` becomes the number of larger tokens, and
  // the result is false when there are not that many.
  bool find(int64_t rank, int threads, Key &found, int64_t &above) const {
    Key known = 0;
    found = 0;
    above = 0;
    for (int top = int(sizeof(Key)) * 8; top > 0;) {
      const int shift = std::max(0, top - digit_bits);
      const Histogram counts = histogram(found, known, shift, threads);
      int digit = (1 << digit_bits) - 1;
      while (digit >= 0 && above + counts[digit] <= rank)
        above += counts[digit--];
      if (digit < 0)
        return false;
      const Key mask = Key((Key(1) << (top - shift)) - 1) << shift;
      // The last digit overlaps the one before when the width is no multiple of the digit's; both agree
      // there.
      found = (found & ~mask) | ((Key(digit) << shift) & mask);
      known |= mask;
      top = shift;
    }
    return true;
  }

  int64_t size() const {
    int64_t n = 0;
    tokens(0, rows, [&](int64_t, Key) { ++n; });
    return n;
  }
};

// One scope after another with parallel reads inside when they are few, in parallel when they are many.
template <class T, class Body> void each_scope(const Select &s, int threads, Body &&body) {
  const Scopes scopes(s.scope, s.rows.count, s.scopes);
  const bool many = s.scopes >= 4 * threads;
  parallel(s.scopes, many ? std::max<int64_t>(1, row_grain(s.scopes, s.rows.size)) : s.scopes, threads,
           [&](int64_t first, int64_t last) {
             for (int64_t g = first; g < last; ++g)
               body(g,
                    Scope<T>{s, scopes.row.data() + scopes.start[g], scopes.start[g + 1] - scopes.start[g]},
                    many ? 1 : threads);
           });
}

} // namespace

void top_k(const Select &s, bool *chosen, int threads) {
  std::fill(chosen, chosen + s.rows.size, false);
  with_float(s.type, [&](auto t) {
    using T = typename decltype(t)::type;
    each_scope<T>(s, threads, [&](int64_t g, const Scope<T> &scope, int inner) {
      if (s.wanted[g] <= 0)
        return;
      typename Scope<T>::Key threshold;
      int64_t above;
      if (!scope.find(s.wanted[g] - 1, inner, threshold, above)) {
        scope.tokens(0, scope.rows, [&](int64_t i, auto) { chosen[i] = true; });
        return;
      }
      int64_t ties = s.wanted[g] - above;
      scope.tokens(0, scope.rows, [&](int64_t i, auto k) {
        chosen[i] = k > threshold || (k == threshold && ties > 0);
        ties -= k == threshold;
      });
    });
  });
}

void kth(const Select &s, void *values, int threads) {
  with_float(s.type, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = accumulate_t<T>;
    each_scope<T>(s, threads, [&](int64_t g, const Scope<T> &scope, int inner) {
      typename Scope<T>::Key found;
      int64_t above;
      const int64_t rank = scope.size() - 1 - s.wanted[g];
      const bool exists = rank >= 0 && s.wanted[g] >= 0 && scope.find(rank, inner, found, above);
      static_cast<A *>(values)[g] = exists ? number_of(found) : std::numeric_limits<A>::quiet_NaN();
    });
  });
}

void maximum_variance(const MaximumVariance &m) {
  std::fill(m.chosen, m.chosen + m.rows, false);
  Scopes scopes(m.scope, m.rows, m.scopes);
  for (int64_t g = 0; g < m.scopes; ++g) {
    int64_t *row = scopes.row.data() + scopes.start[g];
    const int64_t size = scopes.start[g + 1] - scopes.start[g], keep = std::min(m.wanted[g], size);
    if (keep <= 0)
      continue;
    std::stable_sort(row, row + size,
                     [&](int64_t a, int64_t b) { return order_key(m.x[a]) > order_key(m.x[b]); });
    const int64_t best = most_varied(size, keep, [&](int64_t i) { return m.x[row[i]]; });
    for (int64_t i = 0; i < size; ++i)
      m.chosen[row[i]] = i < best || i >= size - (keep - best);
  }
}

} // namespace tokcredit::cpu
