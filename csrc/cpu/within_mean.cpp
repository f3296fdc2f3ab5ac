// Digit by digit from the largest: all tokens of a digit are taken as long as their mean allows it, and the
// tokens of the first digit that it does not allow are looked at more closely.
#include "math/order.hpp"
#include "ops/select.hpp"
#include <algorithm>
#include <vector>

namespace tokcredit::cpu {
namespace {

constexpr int digit_bits = 10, digits = 1 << digit_bits;
constexpr size_t few = 64; // keys that are sorted rather than counted
constexpr size_t lanes = 4;

// The keys of a digit: how many, and their sum. Neighbours count in other lanes, because most of them have
// the same digit and each would wait for the one before.
struct Digit {
  double sum = 0;
  int64_t count = 0;
};

struct Taken {
  const WithinMean &w;
  double sum = 0;
  int64_t count = 0;

  bool admits(double more, int64_t tokens) const {
    const int64_t size = count + tokens;
    return size <= w.least || !((sum + more) / double(size) > w.budget);
  }
  void add(double more, int64_t tokens) {
    sum += more;
    count += tokens;
  }
};

// All smaller keys are taken, and so many of those that equal it.
template <class Key> struct Threshold {
  Key key = Key(~Key(0)); // NaN
  int64_t ties = 0;
};

template <class Key> Threshold<Key> walk(std::vector<Key> &keys, Taken &taken) {
  std::sort(keys.begin(), keys.end());
  Threshold<Key> found;
  for (const Key key : keys) {
    found.ties = key == found.key ? found.ties : 0;
    found.key = key;
    if (!taken.admits(number_of(key), 1))
      break;
    taken.add(number_of(key), 1);
    ++found.ties;
  }
  return found;
}

template <class Key> Threshold<Key> find(std::vector<Key> &keys, const WithinMean &w) {
  Taken taken{w};
  for (int top = 8 * sizeof(Key); top > 0 && keys.size() > few;) {
    const int shift = std::max(top - digit_bits, 0);
    const auto digit = [&](Key key) { return size_t(key >> shift & (digits - 1)); };
    std::vector<Digit> seen(lanes * digits);
    for (size_t i = 0; i < keys.size(); ++i) {
      Digit &own = seen[lanes * digit(keys[i]) + i % lanes];
      own.sum += number_of(keys[i]);
      ++own.count;
    }
    size_t d = 0;
    for (; d < digits; ++d) {
      Digit all;
      for (size_t lane = 0; lane < lanes; ++lane) {
        all.sum += seen[lanes * d + lane].sum;
        all.count += seen[lanes * d + lane].count;
      }
      if (all.count && !taken.admits(all.sum, all.count))
        break;
      taken.add(all.sum, all.count);
    }
    if (d == digits)
      return top == 8 * int(sizeof(Key)) ? Threshold<Key>{} : walk(keys, taken); // but for rounding
    size_t left = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      const Key key = keys[i];
      keys[left] = key;
      left += digit(key) == d;
    }
    keys.resize(left);
    top = shift;
  }
  return walk(keys, taken);
}

template <class T> void choose_tokens(const WithinMean &w) {
  using Key = decltype(order_key(T{}));
  const T *x = static_cast<const T *>(w.x);
  std::vector<Key> keys(static_cast<size_t>(w.rows.size));
  size_t found = 0;
  for (int64_t r = 0; r < w.rows.count; ++r)
    for (int64_t t = w.rows.begin[r]; t < w.rows.end[r]; ++t) {
      keys[found] = order_key(x[t]);
      found += (!w.rows.mask || w.rows.mask[t]) & (keys[found] != Key(~Key(0)));
    }
  keys.resize(found);
  Threshold<Key> threshold = find(keys, w);
  // A NaN has no smaller number, and all that equal the threshold are walked through only where some are
  // taken.
  const T bound = number_of(threshold.key);
  const bool all = threshold.key == Key(~Key(0));
  for (int64_t r = 0; r < w.rows.count; ++r)
    for (int64_t t = w.rows.begin[r]; t < w.rows.end[r]; ++t) {
      const bool live = !w.rows.mask || w.rows.mask[t];
      w.chosen[t] = live & (all ? x[t] == x[t] : x[t] < bound);
    }
  for (int64_t r = 0; r < w.rows.count && threshold.ties > 0; ++r)
    for (int64_t t = w.rows.begin[r]; t < w.rows.end[r] && threshold.ties > 0; ++t)
      if (x[t] == bound && (!w.rows.mask || w.rows.mask[t])) {
        w.chosen[t] = true;
        --threshold.ties;
      }
}

} // namespace

void within_mean(const WithinMean &w) {
  std::fill(w.chosen, w.chosen + w.rows.size, false);
  w.type == Type::f64 ? choose_tokens<double>(w) : choose_tokens<float>(w);
}

} // namespace tokcredit::cpu
