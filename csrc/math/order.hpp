// Floating numbers as unsigned integers that order as the numbers do: -0 equals 0, NaN ranks above +inf.
#pragma once
#include "math/number.hpp"

namespace tokcredit {

TOKCREDIT_FN uint32_t order_key(float x) {
  if (x != x)
    return ~uint32_t(0);
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
TOKCREDIT_FN uint64_t order_key(double x) {
  if (x != x)
    return ~uint64_t(0);
  x += 0.0;
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}

// The number of a key. A key that stands for any NaN becomes the quiet one.
TOKCREDIT_FN float number_of(uint32_t key) {
  const uint32_t bits = key == ~uint32_t(0) ? 0x7fc00000u : key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
TOKCREDIT_FN double number_of(uint64_t key) {
  const uint64_t top = uint64_t(1) << 63;
  const uint64_t bits = key == ~uint64_t(0) ? uint64_t(0x7ff8) << 48 : key & top ? key & ~top : ~key;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

} // namespace tokcredit
