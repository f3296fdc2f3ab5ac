#include "ops/scan.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "math/dispatch.hpp"

namespace tokcredit::cpu {
namespace {

template <class T, bool exclusive> void row(const Scan &s, int64_t r) {
  using A = accumulate_t<T>;
  const T *x = static_cast<const T *>(s.x);
  A *y = static_cast<A *>(s.y);
  const bool *mask = s.rows.mask;
  // Double even for float32: a cumulative log-ratio over 100k tokens keeps its digits.
  double state = s.carry_in ? static_cast<const A *>(s.carry_in)[r] : A(0);
  const double decay = s.decay;
  const int64_t step = s.reverse ? -1 : 1;
  const int64_t length = s.rows.end[r] - s.rows.begin[r];
  int64_t t = s.reverse ? s.rows.end[r] - 1 : s.rows.begin[r];
  for (int64_t k = 0; k < length; ++k, t += step) {
    if (mask && !mask[t]) {
      y[t] = A(0);
      continue;
    }
    const double before = state;
    state = decay * state + double(load(x[t]));
    y[t] = A(exclusive ? before : state);
  }
  static_cast<A *>(s.carry_out)[r] = A(state);
  clear_padding(s.rows, r, y);
}

} // namespace

void scan(const Scan &s, int threads) {
  with_float(s.type, [&](auto t) {
    using T = typename decltype(t)::type;
    parallel(s.rows.count, row_grain(s.rows.count, s.rows.size), threads, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        s.exclusive ? row<T, true>(s, r) : row<T, false>(s, r);
    });
  });
}

} // namespace tokcredit::cpu
