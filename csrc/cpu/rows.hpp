// Walking rows and clearing what lies between them.
#pragma once
#include "ops/array.hpp"
#include <algorithm>

namespace tokcredit::cpu {

// Zeroes the padding that follows row r (and, for the first row, the padding before it).
template <class T> void clear_padding(const Rows &rows, int64_t r, T *y) {
  if (r == 0)
    std::fill(y, y + rows.begin[0], T{});
  const int64_t next = r + 1 < rows.count ? rows.begin[r + 1] : rows.size;
  std::fill(y + rows.end[r], y + next, T{});
}

} // namespace tokcredit::cpu
