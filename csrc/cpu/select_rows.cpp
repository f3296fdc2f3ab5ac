#include "cpu/select_rows.hpp"
#include "math/dispatch.hpp"
#include "math/order.hpp"

namespace tokcredit::cpu {
namespace {

constexpr int64_t block = 256;

// Calls body(keys, live, first, n) for blocks of tokens, `live` being 1 where they count and else 0.
template <class T, class Body> void each_block(const Tokens &tokens, Body &&body) {
  using A = accumulate_t<T>;
  const T *x = static_cast<const T *>(tokens.x);
  decltype(order_key(A{})) keys[block];
  uint8_t live[block];
  __builtin_memset(live, 1, block);
  for (int64_t first = 0; first < tokens.n; first += block) {
    const int64_t n = tokens.n - first < block ? tokens.n - first : block;
    for (int64_t i = 0; i < n; ++i)
      keys[i] = order_key(A(load(x[first + i])));
    if (tokens.mask)
      __builtin_memcpy(live, tokens.mask + first, n);
    body(keys, live, first, n);
  }
}

} // namespace

namespace TOKCREDIT_LEVEL {

void count_digits(const Tokens &tokens, Beginning b, int shift, uint32_t *counts) {
  with_float(tokens.type, [&](auto t) {
    each_block<typename decltype(t)::type>(
        tokens, [&](const auto *keys, const uint8_t *live, int64_t, int64_t n) {
          for (int64_t i = 0; i < n; ++i)
            counts[i % turns * bins + int64_t(keys[i] >> shift & (bins - 1))] +=
                live[i] & uint32_t((keys[i] & b.known) == b.prefix);
        });
  });
}

int64_t gather(const Tokens &tokens, Beginning b, void *out) {
  int64_t found = 0;
  with_float(tokens.type, [&](auto t) {
    each_block<typename decltype(t)::type>(tokens, [&](auto *keys, const uint8_t *live, int64_t, int64_t n) {
      auto *to = static_cast<decltype(keys)>(out);
      for (int64_t i = 0; i < n; ++i) {
        to[found] = keys[i];
        found += live[i] & int64_t((keys[i] & b.known) == b.prefix);
      }
    });
  });
  return found;
}

int64_t gather_between(const Tokens &tokens, uint64_t low, uint64_t high, void *out, int64_t &above) {
  int64_t found = 0;
  with_float(tokens.type, [&](auto t) {
    each_block<typename decltype(t)::type>(tokens, [&](auto *keys, const uint8_t *live, int64_t, int64_t n) {
      using Key = std::remove_reference_t<decltype(*keys)>;
      const Key least(low), most(high);
      auto *to = static_cast<Key *>(out);
      int32_t larger = 0;
      for (int64_t i = 0; i < n; ++i)
        larger += live[i] & int32_t(keys[i] > most);
      above += larger;
      uint8_t inside[block];
      for (int64_t i = 0; i < n; ++i)
        inside[i] = live[i] & uint8_t(keys[i] >= least) & uint8_t(keys[i] <= most);
      for (int64_t i = 0; i < n; ++i) {
        to[found] = keys[i];
        found += inside[i];
      }
    });
  });
  return found;
}

int64_t mark(const Tokens &tokens, uint64_t threshold, bool *chosen) {
  int64_t ties = 0;
  with_float(tokens.type, [&](auto t) {
    each_block<typename decltype(t)::type>(tokens,
                                           [&](auto *keys, const uint8_t *live, int64_t first, int64_t n) {
                                             const std::remove_reference_t<decltype(*keys)> limit(threshold);
                                             auto *out = reinterpret_cast<uint8_t *>(chosen + first);
                                             int32_t equal = 0;
                                             for (int64_t i = 0; i < n; ++i) {
                                               out[i] = live[i] & uint8_t(keys[i] > limit);
                                               equal += live[i] & int32_t(keys[i] == limit);
                                             }
                                             ties += equal;
                                           });
  });
  return ties;
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
