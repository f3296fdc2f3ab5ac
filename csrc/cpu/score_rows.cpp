#include "cpu/score_rows.hpp"
#include "cpu/rows.hpp"
#include "math/dispatch.hpp"
#include "math/score.hpp"

namespace tokcredit::cpu {
namespace {

// The body with a number of the accumulation type.
template <class Body> void with_number(Type type, Body &&body) {
  type == Type::f64 ? body(double{}) : body(float{});
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

void factor_rows(const ScoreFactor &s, int64_t first, int64_t last) {
  with_number(s.type, [&](auto number) {
    using A = decltype(number);
    const FactorOf<A> of(s);
    const A *h = static_cast<const A *>(s.score), *x = static_cast<const A *>(s.log_probs),
            *o = static_cast<const A *>(s.reference), *low = static_cast<const A *>(s.low_bound),
            *high = static_cast<const A *>(s.high_bound);
    A *__restrict y = static_cast<A *>(s.y);
    for (int64_t r = first; r < last; ++r) {
      const A advantage = static_cast<const A *>(s.advantages)[r];
      const int64_t begin = s.rows.begin[r], end = s.rows.end[r];
      if (o)
        for (int64_t t = begin; t < end; ++t)
          y[t] = of.log_ratio(x[t], o[t]);
      else
        for (int64_t t = begin; t < end; ++t)
          y[t] = of.log_ratio(x[t], A(0));
      if (low)
        for (int64_t t = begin; t < end; ++t)
          y[t] = advantage * of(h[t], y[t], low[t], high[t]);
      else
        for (int64_t t = begin; t < end; ++t)
          y[t] = advantage * of(h[t], y[t]);
      clear_padding(s.rows, r, y);
    }
  });
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
