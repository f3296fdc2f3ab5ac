#pragma once
#include "cpu/level.hpp"
#include "ops/array.hpp"

namespace tokcredit::cpu {

constexpr int digit_bits = 11, bins = 1 << digit_bits;
// Neighbours often fall into one bin, and adding to it twice in a row waits; so they are counted in turns.
constexpr int turns = 4;

// Tokens, of which those count that `mask` (null: all) admits.
struct Tokens {
  Type type;
  const void *x;
  const bool *mask;
  int64_t n;
};

// The order keys (math/order.hpp) that begin with `prefix` in the bits of `known`.
struct Beginning {
  uint64_t prefix, known;
};

// count_digits adds to bins[turns][bins] the digits at `shift` of the keys that begin so; gather writes these
// keys, of uint32_t or for float64 uint64_t, to `keys`, which has room for all, and returns their number;
// gather_between does so with the keys from `low` to `high`, and adds to `above` how many are larger; mark
// sets `chosen` where the key is larger than `threshold`, else clears it, and returns how many are equal to
// it.
TOKCREDIT_EACH_LEVEL(void count_digits(const Tokens &tokens, Beginning b, int shift, uint32_t *bins);
                     int64_t gather(const Tokens &tokens, Beginning b, void *keys);
                     int64_t gather_between(const Tokens &tokens, uint64_t low, uint64_t high, void *keys,
                                            int64_t &above);
                     int64_t mark(const Tokens &tokens, uint64_t threshold, bool *chosen);)

} // namespace tokcredit::cpu
