#include "cpu/score_rows.hpp"
#include "math/score.hpp"

namespace tokcredit::cpu {
namespace {

// The body with a number of the type.
template <class Body> void with_number(Type type, Body &&body) {
  type == Type::f64 ? body(double{}) : body(float{});
}

template <class A>
void factors(const ScoreFactor &s, const A *__restrict low, const A *__restrict high, int64_t first,
             int64_t last) {
  const A *h = static_cast<const A *>(s.score), *x = static_cast<const A *>(s.log_ratio);
  const A low_number = exponential(A(s.low_number)), high_number = exponential(A(s.high_number)),
          strength = A(s.strength);
  A *__restrict y = static_cast<A *>(s.y);
  for (int64_t t = first; t < last; ++t)
    y[t] = factor_of(h[t], x[t], low ? exponential(low[t]) : low_number,
                     high ? exponential(high[t]) : high_number, strength);
}

} // namespace

namespace TOKCREDIT_LEVEL {

void deviation_tokens(const Deviation &d, int64_t first, int64_t last) {
  with_number(d.type, [&](auto number) {
    using A = decltype(number);
    const DeviationOf<A> of(d);
    const A *x = static_cast<const A *>(d.x);
    A *y = static_cast<A *>(d.y);
    for (int64_t t = first; t < last; ++t)
      y[t] = of(x[t]);
  });
}

void bounds_tokens(const ScoreBounds &s, int64_t first, int64_t last) {
  with_number(s.type, [&](auto number) {
    using A = decltype(number);
    const BoundsOf<A> of(s);
    const A *h = static_cast<const A *>(s.score);
    A *__restrict below = static_cast<A *>(s.below), *__restrict above = static_cast<A *>(s.above);
    for (int64_t t = first; t < last; ++t)
      below[t] = of.below(h[t]);
    for (int64_t t = first; t < last; ++t)
      above[t] = of.above(h[t]);
  });
}

void factor_tokens(const ScoreFactor &s, int64_t first, int64_t last) {
  with_number(s.type, [&](auto number) {
    using A = decltype(number);
    const A *low = static_cast<const A *>(s.low), *high = static_cast<const A *>(s.high);
    // Bounds are usually given both, or none; a loop with no choice in it is wide.
    if (low && high)
      return factors<A>(s, low, high, first, last);
    if (!low && !high)
      return factors<A>(s, nullptr, nullptr, first, last);
    low ? factors<A>(s, low, nullptr, first, last) : factors<A>(s, nullptr, high, first, last);
  });
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
