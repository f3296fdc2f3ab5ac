#include "cpu/segment_rows.hpp"
#include "math/dispatch.hpp"

namespace tokcredit::cpu {
namespace {

// Every 128th element has a sum of its own, so that the loop is wide and no addition waits for the one
// before.
template <class T> double sum_values(const T *x, const uint8_t *mask, int64_t n) {
  constexpr int64_t width = 128;
  double sums[width] = {};
  for (int64_t i = 0; i < n; i += width) {
    const int64_t m = width < n - i ? width : n - i;
    if (mask)
      for (int64_t k = 0; k < m; ++k) {
        const double v = load(x[i + k]);
        sums[k] += mask[i + k] ? v : 0.0;
      }
    else
      for (int64_t k = 0; k < m; ++k)
        sums[k] += double(load(x[i + k]));
  }
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k)
      sums[k] += sums[k + half];
  return sums[0];
}

} // namespace

namespace TOKCREDIT_LEVEL {

int64_t count_true(const bool *mask, int64_t n) {
  const auto *bytes = reinterpret_cast<const uint8_t *>(mask);
  int64_t total = 0;
  for (int64_t i = 0; i < n;) {
    // Few enough for a narrow sum, which is what makes the loop wide.
    uint8_t sum = 0;
    const int64_t last = n < i + 255 ? n : i + 255;
    for (; i < last; ++i)
      sum = uint8_t(sum + bytes[i]);
    total += sum;
  }
  return total;
}

double sum_true(Type type, const void *x, const bool *mask, int64_t n) {
  double sum = 0;
  with_float(type, [&](auto t) {
    using T = typename decltype(t)::type;
    sum = sum_values(static_cast<const T *>(x), reinterpret_cast<const uint8_t *>(mask), n);
  });
  return sum;
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
