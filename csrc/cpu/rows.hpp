// Walking rows and clearing what lies between them.
#pragma once
#include "ops/array.hpp"
#include <algorithm>

namespace tokcredit::cpu {

namespace {

// 1 for the unmasked of the n tokens from `first` on, 0 for the others and behind them.
template <int64_t size> void read_mask(const Rows &rows, int64_t first, int64_t n, uint8_t (&live)[size]) {
  __builtin_memset(live, 0, size);
  if (rows.mask)
    __builtin_memcpy(live, rows.mask + first, n);
  else
    __builtin_memset(live, 1, n);
}

} // namespace

// Zeroes the padding that follows row r (and, for the first row, the padding before it).
template <class T> void clear_padding(const Rows &rows, int64_t r, T *y) {
  if (r == 0)
    std::fill(y, y + rows.begin[0], T{});
  const int64_t next = r + 1 < rows.count ? rows.begin[r + 1] : rows.size;
  std::fill(y + rows.end[r], y + next, T{});
}

} // namespace tokcredit::cpu
