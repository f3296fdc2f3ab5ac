#include "cpu/diverse_rows.hpp"
#include "math/diverse.hpp"

namespace tokcredit::cpu::TOKCREDIT_LEVEL {

float inner_product(Type type, const void *x, int64_t width, int64_t first, int64_t second) {
  constexpr int64_t lanes = 32;
  float sums[lanes] = {};
  with_vectors(type, [&](auto element) {
    using T = decltype(element);
    const T *a = static_cast<const T *>(x) + first * width, *b = static_cast<const T *>(x) + second * width;
    int64_t k = 0;
    for (; k + lanes <= width; k += lanes)
      for (int64_t lane = 0; lane < lanes; ++lane)
        sums[lane] += load(a[k + lane]) * load(b[k + lane]);
    for (int64_t lane = 0; k < width; ++k, ++lane)
      sums[lane] += load(a[k]) * load(b[k]);
  });
  for (int64_t step = lanes / 2; step > 0; step /= 2)
    for (int64_t lane = 0; lane < step; ++lane)
      sums[lane] += sums[lane + step];
  return sums[0];
}

} // namespace tokcredit::cpu::TOKCREDIT_LEVEL
