#include "cpu/segment_rows.hpp"
#include "cpu/rows.hpp"
#include "math/dispatch.hpp"
#include "math/standard.hpp"

namespace tokcredit::cpu {
namespace {

// Lanes take the true values in turns, so that the loop is wide and none waits for the one before; then they
// are folded into one.
template <int64_t lanes, class A, class T, class Take, class Fold>
A reduce(const T *x, const uint8_t *mask, int64_t n, A empty, Take take, Fold fold) {
  A lane[lanes];
  for (int64_t k = 0; k < lanes; ++k)
    lane[k] = empty;
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t m = lanes < n - i ? lanes : n - i;
    if (mask)
      for (int64_t k = 0; k < m; ++k) {
        const A taken = take(lane[k], A(load(x[i + k])));
        lane[k] = mask[i + k] ? taken : lane[k];
      }
    else
      for (int64_t k = 0; k < m; ++k)
        lane[k] = take(lane[k], A(load(x[i + k])));
  }
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k)
      lane[k] = fold(lane[k], lane[k + half]);
  return lane[0];
}

// Of a few values, fewer lanes: folding them would take longer than the values.
template <class A, class T, class Take, class Fold>
A reduce(const T *x, const uint8_t *mask, int64_t n, A empty, Take take, Fold fold) {
  constexpr int64_t wide = 128, narrow = 16;
  return n < wide ? reduce<narrow>(x, mask, n, empty, take, fold)
                  : reduce<wide>(x, mask, n, empty, take, fold);
}

// Sum of f(value).
template <class T, class F> double sum(const T *x, const uint8_t *mask, int64_t n, F f) {
  return reduce(
      x, mask, n, 0.0, [&](double sum, double v) { return sum + f(v); },
      [](double a, double b) { return a + b; });
}

// The body with the values and the mask as they are stored.
template <class Body> void with_values(Type type, const void *x, const bool *mask, Body &&body) {
  with_float(type, [&](auto t) {
    body(static_cast<const typename decltype(t)::type *>(x), reinterpret_cast<const uint8_t *>(mask));
  });
}

template <class X, class Y>
void affine_row(const RowAffine &a, const X *x, const uint8_t *mask, Y *__restrict y, int64_t n, int64_t k) {
  const double factor = a.factor[k], shift = a.shift[k];
  for (int64_t t = 0; t < n; ++t) {
    const Y value = Y(factor * double(x[t]) + shift);
    y[t] = !mask || mask[t] ? value : Y(0);
  }
}

// The answers of a block as wide as the numbers, and then as bytes: loops over types of one width are wide.
template <class X>
void affine_row(const RowAffine &a, const X *x, const uint8_t *mask, bool *y, int64_t n, int64_t k) {
  constexpr int64_t block = 128;
  const double factor = a.factor[k], shift = a.shift[k], low = a.low, high = a.high;
  auto *bytes = reinterpret_cast<uint8_t *>(y);
  int64_t inside[block];
  for (int64_t first = 0; first < n; first += block) {
    const int64_t size = block < n - first ? block : n - first;
    for (int64_t t = 0; t < size; ++t) {
      const double value = factor * double(x[first + t]) + shift;
      inside[t] = (low < value) & (value < high);
    }
    if (mask)
      for (int64_t t = 0; t < size; ++t)
        bytes[first + t] = uint8_t(inside[t] & mask[first + t]);
    else
      for (int64_t t = 0; t < size; ++t)
        bytes[first + t] = uint8_t(inside[t]);
  }
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
  double total = 0;
  with_values(type, x, mask, [&](const auto *values, const uint8_t *live) {
    total = sum(values, live, n, [](double v) { return v; });
  });
  return total;
}

void squares_true(Type type, const void *x, const bool *mask, int64_t n, double &mean, double &square) {
  mean = square = 0;
  const int64_t count = mask ? count_true(mask, n) : n;
  with_values(type, x, mask, [&](const auto *values, const uint8_t *live) {
    int64_t first = 0;
    while (first < n && live && !live[first])
      ++first;
    if (first == n)
      return;
    // From the first value, so that equal ones have a mean that is exactly theirs.
    const double origin = double(load(values[first]));
    const double about = origin + sum(values, live, n, [&](double v) { return v - origin; }) / double(count);
    square = sum(values, live, n, [&](double v) { return (v - about) * (v - about); });
    mean = about;
  });
}

double extreme_true(Type type, const void *x, const bool *mask, int64_t n, bool least) {
  double found = 0;
  with_values(type, x, mask, [&](const auto *values, const uint8_t *live) {
    using A = decltype(load(*values));
    const A infinite = A(__builtin_inf());
    const auto smaller = [](A a, A b) { return b < a || b != b ? b : a; };
    const auto larger = [](A a, A b) { return b > a || b != b ? b : a; };
    found = least ? reduce(values, live, n, infinite, smaller, smaller)
                  : reduce(values, live, n, -infinite, larger, larger);
  });
  return found;
}

void affine_rows(const RowAffine &a, int64_t first, int64_t last) {
  with_results(a, [&](auto from, auto to) {
    const auto *x = static_cast<const decltype(from) *>(a.x);
    const auto *mask = reinterpret_cast<const uint8_t *>(a.rows.mask);
    auto *y = static_cast<decltype(to) *>(a.y);
    for (int64_t r = first; r < last; ++r) {
      const int64_t begin = a.rows.begin[r], n = a.rows.end[r] - begin;
      affine_row(a, x + begin, mask ? mask + begin : nullptr, y + begin, n, a.per_row ? r : 0);
      clear_padding(a.rows, r, y);
    }
  });
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
