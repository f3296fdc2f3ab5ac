#include "ops/scan.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "math/dispatch.hpp"

namespace tokcredit::cpu {
namespace {

// Rows walked side by side: each step of a recurrence waits for the one before it, those of other rows do
// not.
constexpr int64_t side = 4;

// `count` rows from r on, at most `side`.
template <class T, bool exclusive, bool masked> void walk(const Scan &s, int64_t r, int64_t count) {
  using A = accumulate_t<T>;
  const T *x = static_cast<const T *>(s.x);
  A *y = static_cast<A *>(s.y);
  const int64_t step = s.reverse ? -1 : 1;
  // Double even for float32: a cumulative log-ratio over 100k tokens keeps its digits.
  double state[side], decay[side];
  int64_t at[side], left[side], common = s.rows.size;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t begin = s.rows.begin[r + k], end = s.rows.end[r + k];
    decay[k] = s.decays ? s.decays[r + k] : s.decay;
    state[k] = s.carry_in ? static_cast<const A *>(s.carry_in)[r + k] : A(0);
    at[k] = s.reverse ? end - 1 : begin;
    left[k] = end - begin;
    common = std::min(common, left[k]);
  }
  const auto advance = [&](int64_t k, int64_t t) {
    double &now = state[k];
    const bool live = !masked || s.rows.mask[t];
    const double after = decay[k] * now + double(load(x[t]));
    y[t] = live ? A(exclusive ? now : after) : A(0);
    now = live ? after : now;
  };
  if (count == side) {
    for (int64_t i = 0; i < common; ++i)
      for (int64_t k = 0; k < side; ++k)
        advance(k, at[k] + i * step);
  } else {
    common = 0;
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = common; i < left[k]; ++i)
      advance(k, at[k] + i * step);
    static_cast<A *>(s.carry_out)[r + k] = A(state[k]);
    clear_padding(s.rows, r + k, y);
  }
}

template <class T, bool exclusive> void rows(const Scan &s, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r += side) {
    const int64_t count = std::min(side, last - r);
    s.rows.mask ? walk<T, exclusive, true>(s, r, count) : walk<T, exclusive, false>(s, r, count);
  }
}

} // namespace

void scan(const Scan &s, int threads) {
  with_float(s.type, [&](auto t) {
    using T = typename decltype(t)::type;
    parallel(s.rows.count, row_grain(s.rows.count, s.rows.size), threads, [&](int64_t first, int64_t last) {
      s.exclusive ? rows<T, true>(s, first, last) : rows<T, false>(s, first, last);
    });
  });
}

} // namespace tokcredit::cpu
