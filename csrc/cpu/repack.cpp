#include "ops/repack.hpp"
#include "cpu/parallel.hpp"
#include <cstring>
#include <stdexcept>

namespace tokcredit::cpu {
namespace {

int64_t bytes_of(Type type) {
  switch (type) {
  case Type::f64:
  case Type::i64:
    return 8;
  case Type::f32:
  case Type::i32:
    return 4;
  case Type::bf16:
  case Type::f16:
    return 2;
  case Type::b8:
    return 1;
  }
  throw std::invalid_argument("repack: x: expected a known dtype");
}

} // namespace

void repack(const Repack &p, int threads) {
  const int64_t bytes = bytes_of(p.type);
  const char *x = static_cast<const char *>(p.x);
  char *y = static_cast<char *>(p.y);
  parallel(p.rows, row_grain(p.rows, p.size), threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      // Zeros up to the next row belong to this one, those before the first row to the first.
      if (r == 0)
        std::memset(y, 0, p.to[0] * bytes);
      const int64_t end = p.to[r] + p.length[r], next = r + 1 < p.rows ? p.to[r + 1] : p.size;
      std::memcpy(y + p.to[r] * bytes, x + p.from[r] * bytes, p.length[r] * bytes);
      std::memset(y + end * bytes, 0, (next - end) * bytes);
    }
  });
}

} // namespace tokcredit::cpu
