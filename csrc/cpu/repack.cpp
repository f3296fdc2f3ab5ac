#include "ops/repack.hpp"
#include "cpu/parallel.hpp"
#include <algorithm>

namespace tokcredit::cpu {
void repack(const Repack &p, int threads) {
  const int64_t bytes = bytes_of(p.type);
  const char *x = static_cast<const char *>(p.x);
  char *y = static_cast<char *>(p.y);
  parallel(p.rows, row_grain(p.rows, p.size), threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      // Zeros up to the next row belong to this one, those before the first row to the first.
      if (r == 0)
        std::fill(y, y + p.to[0] * bytes, 0);
      const int64_t end = p.to[r] + p.length[r], next = r + 1 < p.rows ? p.to[r + 1] : p.size;
      std::copy_n(x + p.from[r] * bytes, p.length[r] * bytes, y + p.to[r] * bytes);
      std::fill(y + end * bytes, y + next * bytes, 0);
    }
  });
}

} // namespace tokcredit::cpu
