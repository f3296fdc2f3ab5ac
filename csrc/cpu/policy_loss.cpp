#include "ops/policy_loss.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "math/surrogate.hpp"
#include <limits>

namespace tokcredit::cpu {
namespace {

// One operand seen from one row: a number per token (step 1) or one for all of them (step 0).
template <class A> struct Lane {
  const A *data;
  int64_t step;
  A fallback;

  Lane(const Operand &o, int64_t row, A absent)
      : data(static_cast<const A *>(o.data)), step(o.per == Per::token), fallback(absent) {
    if (data && o.per == Per::row)
      data += row;
  }
  A at(int64_t t) const { return data ? data[t * step] : fallback; }
};

template <class T> void row(const PolicyLoss &p, int64_t r) {
  using A = accumulate_t<T>;
  const A infinity = std::numeric_limits<A>::infinity();
  const T *log_probs = static_cast<const T *>(p.log_probs), *reference = static_cast<const T *>(p.reference);
  A *gradient = static_cast<A *>(p.gradient);
  const Lane<A> log_ratio(p.log_ratio, r, 0), advantages(p.advantages, r, 1), weights(p.weights, r, 1),
      low(p.low, r, -infinity), high(p.high, r, infinity), cap(p.cap, r, infinity), width(p.width, r, 1);
  const A clamp_low = A(p.clamp_low), clamp_high = A(p.clamp_high);
  const auto kind = Surrogate(p.surrogate);
  double stats[loss_stats] = {};
  for (int64_t t = p.rows.begin[r]; t < p.rows.end[r]; ++t) {
    if (p.rows.mask && !p.rows.mask[t]) {
      if (gradient)
        gradient[t] = A(0);
      continue;
    }
    const A log_prob = load(log_probs[t]);
    const A raw = p.log_ratio.data ? log_ratio.at(t) : reference ? log_prob - load(reference[t]) : A(0);
    const A inside = bounded(raw, clamp_low, clamp_high);
    const A w = width.at(t);
    const Paid<A> paid = surrogate(kind, Token<A>{inside, log_prob, advantages.at(t), low.at(t) * w,
                                                  high.at(t) * w, cap.at(t) * w, inside == raw});
    const A weight = weights.at(t);
    if (gradient)
      gradient[t] = weight * paid.gradient;
    stats[0] += double(weight * paid.value);
    stats[1] += 1;
    stats[2] += paid.below;
    stats[3] += paid.above;
    stats[4] += paid.capped;
    stats[5] += double(paid.ratio);
    stats[6] += double(paid.ratio - A(1) - inside);
  }
  std::copy(stats, stats + loss_stats, p.stats + r * loss_stats);
  if (gradient)
    clear_padding(p.rows, r, gradient);
}

} // namespace

void policy_loss(const PolicyLoss &p, int threads) {
  with_float(p.type, [&](auto t) {
    using T = typename decltype(t)::type;
    parallel(p.rows.count, row_grain(p.rows.count, p.rows.size), threads, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        row<T>(p, r);
    });
  });
}

} // namespace tokcredit::cpu
