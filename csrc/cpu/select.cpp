#include "ops/select.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "math/dispatch.hpp"
#include "math/order.hpp"
#include "math/variance.hpp"
#include <algorithm>
#include <array>
#include <functional>
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

constexpr int digit_bits = 11, bins = 1 << digit_bits, turns = 4;
using Histogram = std::array<int64_t, bins>;

// So many keys are sorted out at once rather than digit by digit.
constexpr int64_t few = 1 << 16;

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

  // Integer counts add up to the same in any order, so each chunk adds its own when it is done. Neighbours
  // often fall into one bin, and adding to it twice in a row waits; so they are counted in turns.
  Histogram histogram(Key prefix, Key known, int shift, int threads) const {
    Histogram total{};
    std::mutex guard;
    parallel(rows, row_grain(s.rows.count, s.rows.size), threads, [&](int64_t first, int64_t last) {
      std::array<std::array<uint32_t, bins>, turns> own{};
      int64_t seen = 0;
      tokens(first, last, [&](int64_t, Key k) {
        if ((k & known) == prefix)
          ++own[size_t(seen++ % turns)][size_t((k >> shift) & (bins - 1))];
      });
      std::lock_guard<std::mutex> lock(guard);
      for (const auto &part : own)
        for (size_t d = 0; d < bins; ++d)
          total[d] += part[d];
    });
    return total;
  }

  // The keys that begin with `prefix`, in no order.
  std::vector<Key> matching(Key prefix, Key known, int threads) const {
    std::vector<Key> all;
    std::mutex guard;
    parallel(rows, row_grain(s.rows.count, s.rows.size), threads, [&](int64_t first, int64_t last) {
      std::vector<Key> own;
      tokens(first, last, [&](int64_t, Key k) {
        if ((k & known) == prefix)
          own.push_back(k);
      });
      std::lock_guard<std::mutex> lock(guard);
      all.insert(all.end(), own.begin(), own.end());
    });
    return all;
  }

  // Of few keys: the one of `rank`; how many are larger is added to `above`.
  static void find_among(std::vector<Key> &keys, int64_t rank, Key &found, int64_t &above) {
    std::nth_element(keys.begin(), keys.begin() + rank, keys.end(), std::greater<Key>());
    found = keys[size_t(rank)];
    above += std::count_if(keys.begin(), keys.begin() + rank, [&](Key k) { return k > found; });
  }

  // The key of `rank` (from the largest, counted from 0). `above` becomes the number of larger tokens, and
  // the result is false when there are not that many.
  bool find(int64_t rank, int threads, Key &found, int64_t &above) const {
    Key known = 0;
    found = 0;
    above = 0;
    if (span() <= few) {
      std::vector<Key> keys = matching(0, 0, threads);
      if (rank >= int64_t(keys.size()))
        return false;
      find_among(keys, rank, found, above);
      return true;
    }
    for (int top = int(sizeof(Key)) * 8; top > 0;) {
      const int shift = std::max(0, top - digit_bits);
      const Histogram counts = histogram(found, known, shift, threads);
      int digit = bins - 1;
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
      if (counts[digit] <= few && top > 0) {
        std::vector<Key> keys = matching(found, known, threads);
        find_among(keys, rank - above, found, above);
        return true;
      }
    }
    return true;
  }

  // Tokens, masked ones included.
  int64_t span() const {
    int64_t n = 0;
    for (int64_t i = 0; i < rows; ++i)
      n += s.rows.end[row[i]] - s.rows.begin[row[i]];
    return n;
  }

  int64_t size() const {
    if (!s.rows.mask)
      return span();
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
      // All that are larger, then as many as are wanted of those that tie, in order.
      std::vector<int64_t> ties(size_t(scope.rows), 0);
      parallel(scope.rows, row_grain(s.rows.count, s.rows.size), inner, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          scope.tokens(i, i + 1, [&](int64_t t, auto k) {
            chosen[t] = k > threshold;
            ties[size_t(i)] += k == threshold;
          });
      });
      int64_t left = s.wanted[g] - above;
      for (int64_t i = 0; left > 0 && i < scope.rows; ++i)
        if (ties[size_t(i)])
          scope.tokens(i, i + 1, [&](int64_t t, auto k) {
            if (k == threshold && left-- > 0)
              chosen[t] = true;
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
