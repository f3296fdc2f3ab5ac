#pragma once
#include <cstdint>
#include <cstring>

namespace tokcredit::cpu {

// Length of the common prefix of a and b, at most n: whole blocks first, then the element that differs.
template <class X> int64_t common_run(const X *a, const X *b, int64_t n) {
  constexpr int64_t block = 32;
  int64_t i = 0;
  while (i + block <= n && std::memcmp(a + i, b + i, block * sizeof(X)) == 0)
    i += block;
  while (i < n && a[i] == b[i])
    ++i;
  return i;
}

} // namespace tokcredit::cpu
