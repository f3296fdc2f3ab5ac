#include "ops/select.hpp"
#include "cpu/parallel.hpp"
#include "cpu/segment_rows.hpp"
#include "cpu/select_rows.hpp"
#include "math/dispatch.hpp"
#include "math/order.hpp"
#include "math/quota.hpp"
#include "math/variance.hpp"
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

namespace tokcredit::cpu {
namespace {

// Rows of each scope, in order.
struct Scopes {
  std::vector<int64_t> start, row;

  Scopes(const int64_t *scope, int64_t rows, int64_t scopes) : start(scopes + 1, 0) {
    const auto of = [&](int64_t r) { return scope ? scope[r] : 0; };
    const auto inside = [&](int64_t r) { return of(r) >= 0 && of(r) < scopes; };
    for (int64_t r = 0; r < rows; ++r)
      if (inside(r))
        ++start[of(r) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    row.resize(start.back());
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t r = 0; r < rows; ++r)
      if (inside(r))
        row[next[of(r)]++] = r;
  }
};

using Histogram = std::array<int64_t, bins>;

// So many keys are taken out at once, and so few sorted out rather than digit by digit.
constexpr int64_t few = 1 << 16, fewest = 1 << 10;

// Tokens of a sample that says about where a rank lies.
constexpr int64_t least_sample = 512, most_sample = 4096;

template <class T> struct Scope {
  using A = accumulate_t<T>;
  using Key = decltype(order_key(A{}));
  const Select &s;
  const int64_t *row;
  int64_t rows;

  Tokens tokens(int64_t begin, int64_t n) const {
    return {s.type, static_cast<const T *>(s.x) + begin, s.rows.mask ? s.rows.mask + begin : nullptr, n};
  }
  Tokens tokens_of(int64_t i) const {
    return tokens(s.rows.begin[row[i]], s.rows.end[row[i]] - s.rows.begin[row[i]]);
  }

  // Calls body(t, key) for the tokens of the i-th row, in order.
  template <class Body> void each(int64_t i, Body &&body) const {
    const T *x = static_cast<const T *>(s.x);
    for (int64_t t = s.rows.begin[row[i]]; t < s.rows.end[row[i]]; ++t)
      if (!s.rows.mask || s.rows.mask[t])
        body(t, order_key(A(load(x[t]))));
  }

  template <class Body> void chunks(int threads, Body &&body) const {
    parallel(rows, row_grain(s.rows.count, s.rows.size), threads, body);
  }

  // Integer counts add up to the same in any order, so each chunk adds its own when it is done.
  Histogram histogram(Beginning b, int shift, int threads) const {
    Histogram total{};
    std::mutex guard;
    chunks(threads, [&](int64_t first, int64_t last) {
      std::array<uint32_t, turns * bins> own{};
      for (int64_t i = first; i < last; ++i)
        TOKCREDIT_CHOOSE(count_digits)(tokens_of(i), b, shift, own.data());
      std::lock_guard<std::mutex> lock(guard);
      for (size_t d = 0; d < own.size(); ++d)
        total[d % bins] += own[d];
    });
    return total;
  }

  // The keys that take(tokens, out, above) writes, in no order, and the sum of what it adds to `above`.
  template <class Take> std::vector<Key> gathered(int threads, int64_t &above, Take &&take) const {
    std::vector<Key> all;
    std::mutex guard;
    chunks(threads, [&](int64_t first, int64_t last) {
      const std::unique_ptr<Key[]> own(new Key[size_t(std::min(few, span()))]);
      for (int64_t i = first; i < last; ++i)
        for (int64_t from = s.rows.begin[row[i]]; from < s.rows.end[row[i]]; from += few) {
          int64_t larger = 0;
          const int64_t found =
              take(tokens(from, std::min(few, s.rows.end[row[i]] - from)), own.get(), larger);
          std::lock_guard<std::mutex> lock(guard);
          all.insert(all.end(), own.get(), own.get() + found);
          above += larger;
        }
    });
    return all;
  }

  // The keys that begin so.
  std::vector<Key> matching(Beginning b, int threads) const {
    int64_t none = 0;
    return gathered(threads, none, [&](const Tokens &some, Key *out, int64_t &) {
      return TOKCREDIT_CHOOSE(gather)(some, b, out);
    });
  }

  // The keys around the one of `rank` (from the largest), of `size`, and how many are larger than those: from
  // a sample of every so many-th token. False where the sample is too small or misleads, which costs time
  // only.
  bool around(int64_t rank, int64_t size, int threads, std::vector<Key> &keys, int64_t &above) const {
    const int64_t all = span(), step = all / std::clamp(all / 64, least_sample, most_sample);
    if (step < 16)
      return false;
    std::vector<Key> sample;
    sample.reserve(size_t(all / step + 1));
    for (int64_t i = 0, next = step / 2; i < rows; ++i) {
      const Tokens own = tokens_of(i);
      for (; next < own.n; next += step)
        if (!own.mask || own.mask[next])
          sample.push_back(order_key(A(load(static_cast<const T *>(own.x)[next]))));
      next -= own.n;
    }
    // Three standard deviations of a rank in the sample, or more.
    const auto count = int64_t(sample.size()), place = int64_t(double(rank) / double(size) * double(count)),
               margin = int64_t(1.5 * std::sqrt(double(count))) + 1;
    const auto ranked = [&](int64_t i) {
      std::nth_element(sample.begin(), sample.begin() + i, sample.end(), std::greater<Key>());
      return sample[size_t(i)];
    };
    const Key high = place - margin < 0 ? ~Key(0) : ranked(place - margin);
    const Key low = place + margin >= count ? Key(0) : ranked(place + margin);
    above = 0;
    keys = gathered(threads, above, [&](const Tokens &some, Key *out, int64_t &larger) {
      return TOKCREDIT_CHOOSE(gather_between)(some, low, high, out, larger);
    });
    return above <= rank && rank - above < int64_t(keys.size());
  }

  static Histogram histogram(const std::vector<Key> &keys, int shift) {
    Histogram total{};
    for (const Key k : keys)
      ++total[size_t(k >> shift & (bins - 1))];
    return total;
  }

  // Of these keys, those that begin so.
  static void keep(std::vector<Key> &keys, Beginning b) {
    size_t kept = 0;
    for (const Key k : keys) {
      keys[kept] = k;
      kept += (k & b.known) == b.prefix;
    }
    keys.resize(kept);
  }

  // Of few keys: the one of `rank`; how many are larger is added to `above`.
  static void find_among(std::vector<Key> &keys, int64_t rank, Key &found, int64_t &above) {
    std::nth_element(keys.begin(), keys.begin() + rank, keys.end(), std::greater<Key>());
    found = keys[size_t(rank)];
    above += std::count_if(keys.begin(), keys.begin() + rank, [&](Key k) { return k > found; });
  }

  // The key of `rank` (from the largest, counted from 0), of `size` tokens. `above` becomes the number of
  // larger tokens, and the result is false when there are not that many.
  bool find(int64_t rank, int64_t size, int threads, Key &found, int64_t &above) const {
    if (rank >= size)
      return false;
    const int64_t all = span();
    Key known = 0;
    found = 0;
    std::vector<Key> keys;
    // Keys that are no more than a quarter of the tokens are taken out of them.
    bool taken = around(rank, size, threads, keys, above);
    if (!taken) {
      above = 0;
      taken = all <= few;
      keys = taken ? matching({0, 0}, threads) : std::vector<Key>{};
    }
    for (int top = int(sizeof(Key)) * 8; top > 0;) {
      if (taken && int64_t(keys.size()) <= fewest) {
        find_among(keys, rank - above, found, above);
        return true;
      }
      const int shift = std::max(0, top - digit_bits);
      const Histogram counts = taken ? histogram(keys, shift) : histogram({found, known}, shift, threads);
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
      if (taken)
        keep(keys, {found, known});
      else if (counts[digit] <= all / 4)
        keys = matching({found, known}, threads);
      taken = taken || counts[digit] <= all / 4;
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
    for (int64_t i = 0; i < rows; ++i)
      n += TOKCREDIT_CHOOSE(count_true)(tokens_of(i).mask, tokens_of(i).n);
    return n;
  }
};

// One scope after another with parallel reads inside when they are few, in parallel when they are many.
template <class T, class Body> void each_scope(const Select &s, int threads, Body &&body) {
  const Scopes scopes(s.scope, s.rows.count, s.scopes);
  const bool many = s.scopes / 4 >= threads;
  const int64_t grain = many ? row_grain(s.scopes, s.rows.size) : std::max<int64_t>(1, s.scopes);
  parallel(s.scopes, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g)
      body(g, Scope<T>{s, scopes.row.data() + scopes.start[g], scopes.start[g + 1] - scopes.start[g]},
           many ? 1 : threads);
  });
}

} // namespace

void top_k(const Select &s, bool *chosen, int threads) {
  parallel(s.rows.size, 1 << 20, threads,
           [&](int64_t first, int64_t last) { std::fill(chosen + first, chosen + last, false); });
  with_float(s.type, [&](auto t) {
    using T = typename decltype(t)::type;
    each_scope<T>(s, threads, [&](int64_t g, const Scope<T> &scope, int inner) {
      const int64_t size = scope.size(), wanted = wanted_of(s.wanted, g, size);
      if (wanted <= 0)
        return;
      typename Scope<T>::Key threshold;
      int64_t above;
      if (!scope.find(wanted - 1, size, inner, threshold, above)) {
        for (int64_t i = 0; i < scope.rows; ++i)
          scope.each(i, [&](int64_t t, auto) { chosen[t] = true; });
        return;
      }
      // All that are larger, then as many as are wanted of those that tie, in order.
      std::vector<int64_t> ties(size_t(scope.rows), 0);
      scope.chunks(inner, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          ties[size_t(i)] =
              TOKCREDIT_CHOOSE(mark)(scope.tokens_of(i), threshold, chosen + s.rows.begin[scope.row[i]]);
      });
      int64_t left = wanted - above;
      for (int64_t i = 0; left > 0 && i < scope.rows; ++i)
        if (ties[size_t(i)])
          scope.each(i, [&](int64_t t, auto k) {
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
      // Found by its rank from the largest; below 0 there is none.
      const int64_t size = scope.size(), wanted = wanted_of(s.wanted, g, size),
                    rank = wanted < 0 ? -1 : size - 1 - wanted;
      const bool exists = rank >= 0 && scope.find(rank, size, inner, found, above);
      static_cast<A *>(values)[g] = exists ? number_of(found) : std::numeric_limits<A>::quiet_NaN();
    });
  });
}

void maximum_variance(const MaximumVariance &m) {
  std::fill(m.chosen, m.chosen + m.rows, false);
  Scopes scopes(m.scope, m.rows, m.scopes);
  for (int64_t g = 0; g < m.scopes; ++g) {
    int64_t *row = scopes.row.data() + scopes.start[g];
    const int64_t size = scopes.start[g + 1] - scopes.start[g],
                  keep = std::min(wanted_of(m.wanted, g, size), size);
    if (keep <= 0)
      continue;
    std::stable_sort(row, row + size,
                     [&](int64_t a, int64_t b) { return order_key(m.x[a]) > order_key(m.x[b]); });
    const int64_t best = most_varied(size, keep, m.largest, [&](int64_t i) { return m.x[row[i]]; });
    for (int64_t i = 0; i < size; ++i)
      m.chosen[row[i]] = i < best || i >= size - (keep - best);
  }
}

} // namespace tokcredit::cpu
