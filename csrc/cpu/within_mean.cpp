// Digit by digit from the largest: all tokens of a digit are taken as long as their mean allows it, and the
// tokens of the first digit that it does not allow are looked at more closely.
#include "math/order.hpp"
#include "ops/select.hpp"
#include <algorithm>
#include <vector>

namespace tokcredit::cpu {
namespace {

constexpr int digit_bits = 11, digits = 1 << digit_bits;
constexpr size_t few = 64; // keys that are sorted rather than counted

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
    std::vector<int64_t> counts(digits);
    std::vector<double> sums(digits);
    for (const Key key : keys) {
      ++counts[digit(key)];
      sums[digit(key)] += number_of(key);
    }
    size_t d = 0;
    for (; d < digits && (!counts[d] || taken.admits(sums[d], counts[d])); ++d)
      taken.add(sums[d], counts[d]);
    if (d == digits)
      return top == 8 * int(sizeof(Key)) ? Threshold<Key>{} : walk(keys, taken); // but for rounding
    keys.erase(std::remove_if(keys.begin(), keys.end(), [&](Key key) { return digit(key) != d; }),
               keys.end());
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
  for (int64_t r = 0; r < w.rows.count; ++r)
    for (int64_t t = w.rows.begin[r]; t < w.rows.end[r]; ++t) {
      const Key key = order_key(x[t]);
      const bool live = !w.rows.mask || w.rows.mask[t];
      w.chosen[t] = live && (key < threshold.key || (key == threshold.key && threshold.ties-- > 0));
    }
}

} // namespace

void within_mean(const WithinMean &w) {
  std::fill(w.chosen, w.chosen + w.rows.size, false);
  w.type == Type::f64 ? choose_tokens<double>(w) : choose_tokens<float>(w);
}

} // namespace tokcredit::cpu
