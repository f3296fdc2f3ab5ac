// Floating numbers as unsigned integers that order as the numbers do: -0 equals 0, NaN ranks above +inf. Half
// precision has keys of 16 bits.
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
TOKCREDIT_FN uint16_t half_key(uint16_t bits, uint16_t infinity) {
  const uint16_t magnitude = bits & 0x7fff;
  if (magnitude > infinity)
    return 0xffff;
  return uint16_t(magnitude == 0 ? 0x8000 : bits & 0x8000 ? ~bits : bits | 0x8000);
}
TOKCREDIT_FN uint16_t order_key(bf16 x) { return half_key(x.bits, 0x7f80); }
TOKCREDIT_FN uint16_t order_key(f16 x) { return half_key(x.bits, 0x7c00); }

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
TOKCREDIT_FN uint16_t half_bits(uint16_t key, uint16_t nan) {
  return uint16_t(key == 0xffff ? nan : key & 0x8000 ? key & 0x7fff : ~key);
}

// With the type that the key was made of.
template <class T, class Key> TOKCREDIT_FN T number_of(Key key) { return number_of(key); }
template <> TOKCREDIT_FN bf16 number_of<bf16>(uint16_t key) { return {half_bits(key, 0x7fc0)}; }
template <> TOKCREDIT_FN f16 number_of<f16>(uint16_t key) { return {half_bits(key, 0x7e00)}; }

} // namespace tokcredit
