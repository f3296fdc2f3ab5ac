#include "cpu/score_rows.hpp"
#include "math/dispatch.hpp"
#include "math/score.hpp"

namespace tokcredit::cpu {
namespace {

// The body with a number of the accumulation type.
template <class Body> void with_number(Type type, Body &&body) {
  type == Type::f64 ? body(double{}) : body(float{});
}

// Bounds from arrays, or the same at every token: a loop with no choice in it is wide.
template <class A, bool low_varies, bool high_varies>
void factors(const ScoreFactor &s, int64_t first, int64_t last) {
  const A *h = static_cast<const A *>(s.score), *x = static_cast<const A *>(s.log_ratio),
          *low = static_cast<const A *>(s.low), *high = static_cast<const A *>(s.high);
  const A least = exponential(A(s.low_number)), most = exponential(A(s.high_number)), strength = A(s.strength);
  A *__restrict y = static_cast<A *>(s.y);
  for (int64_t t = first; t < last; ++t) {
    const A below = low_varies ? exponential(low[t]) : least, above = high_varies ? exponential(high[t]) : most;
    y[t] = factor_of(h[t], x[t], below, above, strength);
  }
}

} // namespace

namespace TOKCREDIT_LEVEL {

void log_tokens(const LogDeviation &d, int64_t first, int64_t last) {
  with_float(d.type, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulate_t<T>;
    const T *x = static_cast<const T *>(d.x);
    A *__restrict y = static_cast<A *>(d.y);
    for (int64_t t = first; t < last; ++t)
      y[t] = floored_log(A(load(x[t])), d.floor);
  });
}

void distance_tokens(const LogDeviation &d, const Moments<Reduction::moments> &moments, const void *quantile,
                     int64_t first, int64_t last) {
  with_number(d.type, [&](auto number) {
    using A = decltype(number);
    const Distance<A> distance(d, moments, *static_cast<const A *>(quantile));
    A *y = static_cast<A *>(d.y);
    for (int64_t t = first; t < last; ++t)
      y[t] = distance(y[t]);
  });
}

void bounds_tokens(const ScoreBounds &s, int64_t first, int64_t last) {
  with_number(s.type, [&](auto number) {
    using A = decltype(number);
    const BoundsOf<A> of(s);
    const A *h = static_cast<const A *>(s.score);
    A *__restrict below = static_cast<A *>(s.below), *__restrict above = static_cast<A *>(s.above);
    for (int64_t t = first; t < last; ++t) {
      const Bounds<A> b = of(h[t]);
      below[t] = b.below;
      above[t] = b.above;
    }
  });
}

void factor_tokens(const ScoreFactor &s, int64_t first, int64_t last) {
  with_number(s.type, [&](auto number) {
    using A = decltype(number);
    const auto of = s.low ? (s.high ? factors<A, true, true> : factors<A, true, false>)
                          : (s.high ? factors<A, false, true> : factors<A, false, false>);
    of(s, first, last);
  });
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
