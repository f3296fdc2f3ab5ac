#include "ops/policy_loss.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "cpu/simd.hpp"
#include "math/dispatch.hpp"
#include "math/surrogate.hpp"
#include <limits>
#include <memory>
#include <numeric>

namespace tokcredit::cpu {
namespace {

// Tokens per block: its arrays stay in the first-level cache.
constexpr int64_t block = 256;

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

  bool per_token() const { return data && step; }

  // Once per row: the number that all of its tokens share, if they do.
  void begin(A *out) const {
    if (!per_token())
      std::fill(out, out + block, data ? *data : fallback);
  }

  // Once per block: its own numbers, with a harmless one where masked.
  void read(int64_t first, int64_t n, const A *live, A harmless, A *out) const {
    if (per_token())
      for (int64_t i = 0; i < n; ++i)
        out[i] = live[i] != A(0) ? data[first + i] : harmless;
  }
};

// Up to `block` tokens of a row: what goes in, and what comes out. `live` is 0 where masked, and whatever the
// arguments hold there has been replaced by a harmless number.
template <class A> struct Block {
  A live[block], raw[block], log_prob[block], advantage[block], weight[block], low[block], high[block],
      cap[block], width[block];
  A columns[loss_stats][block], folded[loss_stats * lanes];
};

// log_prob, and as raw the difference to the reference within `bound`, both 0 where masked.
template <class T, class A>
TOKCREDIT_INLINE void read_body(Block<A> &b, const T *log_probs, const T *reference, const bool *mask,
                                int64_t n, A bound) {
  if (mask)
    for (int64_t i = 0; i < n; ++i)
      b.live[i] = A(mask[i]);
  for (int64_t i = 0; i < n; ++i) {
    const A x = load(log_probs[i]);
    b.log_prob[i] = b.live[i] != A(0) ? x : A(0);
  }
  if (reference)
    for (int64_t i = 0; i < n; ++i) {
      const A x = bounded(A(load(log_probs[i]) - load(reference[i])), -bound, bound);
      b.raw[i] = b.live[i] != A(0) ? x : A(0);
    }
}

// Positions counted from `before`, raised to `power`; a masked token has the width of the one before it.
template <class A>
TOKCREDIT_INLINE int64_t widen_body(Block<A> &b, const bool *mask, int64_t n, int64_t before, A power) {
  int32_t at[block], seen = 0;
  for (int64_t i = 0; i < n; ++i)
    at[i] = int32_t(i + 1);
  if (mask)
    for (int64_t i = 0; i < n; ++i)
      at[i] = seen += mask[i];
  for (int64_t i = 0; i < n; ++i)
    b.width[i] = A(at[i]) + A(before);
  if (power == A(0.5))
    for (int64_t i = 0; i < n; ++i)
      b.width[i] = std::sqrt(b.width[i]);
  else
    for (int64_t i = 0; i < n; ++i)
      b.width[i] = growth(b.width[i], power);
  return before + at[n - 1];
}

// The clipped surrogate where all tokens of the row share the bounds: their exponentials are known
// beforehand, and have the same bits.
template <class A> struct Shared {
  A low, high, cap;
  A exp_low, exp_high, exp_cap;
};

template <class A> TOKCREDIT_INLINE Paid<A> clipped(const Token<A> &t, const Shared<A> &s) {
  const A q = exponential(t.log_ratio), a = t.advantage;
  const Stop<A> at = stop(t);
  A stopped = at.below ? s.exp_low : q;
  stopped = at.above ? s.exp_high : stopped;
  stopped = at.capped ? s.exp_cap : stopped;
  const A gradient = at.below | at.above | at.capped | !t.moves ? A(0) : -a * q;
  return {-a * stopped, gradient, q, at.below, at.above, at.capped};
}

template <Surrogate kind, bool shared, class A>
TOKCREDIT_INLINE void evaluate_body(Block<A> &b, int64_t n, A clamp_low, A clamp_high, A *gradient,
                                    double *totals) {
  const Shared<A> bounds{
      b.low[0], b.high[0], b.cap[0], exponential(b.low[0]), exponential(b.high[0]), exponential(b.cap[0])};
  for (int64_t i = 0; i < n; ++i) {
    const A x = bounded(b.raw[i], clamp_low, clamp_high), live = b.live[i];
    [[maybe_unused]] const A w = b.width[i];
    Paid<A> paid;
    if constexpr (shared)
      paid = clipped<A>(
          {x, b.log_prob[i], b.advantage[i], bounds.low, bounds.high, bounds.cap, x == b.raw[i]}, bounds);
    else
      paid = surrogate<kind, A>(
          {x, b.log_prob[i], b.advantage[i], b.low[i] * w, b.high[i] * w, b.cap[i] * w, x == b.raw[i]});
    // The raw log-ratio is not needed again.
    b.raw[i] = live != A(0) ? b.weight[i] * paid.gradient : A(0);
    b.columns[0][i] = live != A(0) ? b.weight[i] * paid.value : A(0);
    b.columns[1][i] = live;
    b.columns[2][i] = paid.below ? live : A(0);
    b.columns[3][i] = paid.above ? live : A(0);
    b.columns[4][i] = paid.capped ? live : A(0);
    b.columns[5][i] = live != A(0) ? paid.ratio : A(0);
    b.columns[6][i] = live != A(0) ? paid.ratio - A(1) - x : A(0);
  }
  if (gradient)
    for (int64_t i = 0; i < n; ++i)
      gradient[i] = b.raw[i];
  // Columns side by side at every step, as each step waits for the one before it.
  int64_t width = lanes;
  while (width < n)
    width *= 2;
  for (int c = 0; c < loss_stats; ++c)
    for (int64_t i = n; i < width; ++i)
      b.columns[c][i] = A(0);
  for (int64_t half = width / 2; half >= lanes; half /= 2)
    for (int c = 0; c < loss_stats; ++c)
      for (int64_t k = 0; k < half; ++k)
        b.columns[c][k] += b.columns[c][k + half];
  for (int c = 0; c < loss_stats; ++c)
    std::copy(b.columns[c], b.columns[c] + lanes, b.folded + c * lanes);
  for (int64_t k = 0; k < loss_stats * lanes; ++k)
    totals[k] += double(b.folded[k]);
}

// target_clones needs plain functions.
#define TOKCREDIT_READ(T, A)                                                                                 \
  TOKCREDIT_CLONES void read(Block<A> &b, const T *log_probs, const T *reference, const bool *mask,          \
                             int64_t n, A bound) {                                                           \
    read_body(b, log_probs, reference, mask, n, bound);                                                      \
  }
TOKCREDIT_READ(float, float)
TOKCREDIT_READ(bf16, float)
TOKCREDIT_READ(f16, float)
TOKCREDIT_READ(double, double)
#undef TOKCREDIT_READ

#define TOKCREDIT_EVALUATE(name, kind, shared, A)                                                            \
  TOKCREDIT_CLONES void name##_##A(Block<A> &b, int64_t n, A low, A high, A *gradient, double *totals) {     \
    evaluate_body<Surrogate::kind, shared, A>(b, n, low, high, gradient, totals);                            \
  }
#define TOKCREDIT_EVALUATE_ALL(A)                                                                            \
  TOKCREDIT_CLONES int64_t widen(Block<A> &b, const bool *mask, int64_t n, int64_t before, A power) {        \
    return widen_body(b, mask, n, before, power);                                                            \
  }                                                                                                          \
  TOKCREDIT_EVALUATE(clip, clip, false, A)                                                                   \
  TOKCREDIT_EVALUATE(clip_shared, clip, true, A)                                                             \
  TOKCREDIT_EVALUATE(weighted, weighted, false, A)                                                           \
  TOKCREDIT_EVALUATE(soft, soft, false, A)                                                                   \
  TOKCREDIT_EVALUATE(k1, k1, false, A)                                                                       \
  TOKCREDIT_EVALUATE(k2, k2, false, A)                                                                       \
  TOKCREDIT_EVALUATE(k3, k3, false, A)                                                                       \
  void evaluate(Surrogate kind, bool shared, Block<A> &b, int64_t n, A low, A high, A *gradient,             \
                double *totals) {                                                                            \
    void (*const table[])(Block<A> &, int64_t, A, A, A *, double *) = {clip_##A, weighted_##A, soft_##A,     \
                                                                       k1_##A,   k2_##A,       k3_##A};      \
    (kind == Surrogate::clip && shared ? clip_shared_##A : table[int(kind)])(b, n, low, high, gradient,      \
                                                                             totals);                        \
  }
TOKCREDIT_EVALUATE_ALL(float)
TOKCREDIT_EVALUATE_ALL(double)
#undef TOKCREDIT_EVALUATE_ALL
#undef TOKCREDIT_EVALUATE

// raw becomes the sum up to and including each token. Four at a time, so that only one addition in four waits
// for the one before it.
template <class A> double accumulate(A *raw, int64_t n, double sum) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const double one = raw[i], two = one + double(raw[i + 1]), three = two + double(raw[i + 2]);
    const double four = two + (double(raw[i + 2]) + double(raw[i + 3]));
    raw[i] = A(sum + one);
    raw[i + 1] = A(sum + two);
    raw[i + 2] = A(sum + three);
    sum += four;
    raw[i + 3] = A(sum);
  }
  for (; i < n; ++i)
    raw[i] = A(sum += double(raw[i]));
  return sum;
}

template <class T, class A> void row(const PolicyLoss &p, int64_t r, Block<A> &b) {
  const A infinity = std::numeric_limits<A>::infinity();
  const T *log_probs = static_cast<const T *>(p.log_probs);
  const T *reference = p.log_ratio.data ? nullptr : static_cast<const T *>(p.reference);
  A *gradient = static_cast<A *>(p.gradient);
  const bool *mask = p.rows.mask;
  const Lane<A> log_ratio(p.log_ratio, r, 0), advantages(p.advantages, r, 1), weights(p.weights, r, 1),
      low(p.low, r, -infinity), high(p.high, r, infinity), cap(p.cap, r, infinity);
  const bool shared = p.power == 0 && !low.per_token() && !high.per_token() && !cap.per_token();
  const A bound = p.cumulative ? A(p.bound) : infinity;
  std::fill(b.live, b.live + block, A(1));
  advantages.begin(b.advantage);
  weights.begin(b.weight);
  low.begin(b.low);
  high.begin(b.high);
  cap.begin(b.cap);
  std::fill(b.width, b.width + block, A(1));
  double totals[loss_stats * lanes] = {}, sum = 0;
  int64_t position = 0;
  for (int64_t first = p.rows.begin[r]; first < p.rows.end[r]; first += block) {
    const int64_t n = std::min(block, p.rows.end[r] - first);
    if (!reference)
      log_ratio.begin(b.raw);
    if (p.trains && !mask)
      std::fill(b.live, b.live + n, A(1));
    read(b, log_probs + first, reference ? reference + first : nullptr, mask ? mask + first : nullptr, n,
         bound);
    if (p.cumulative)
      sum = accumulate(b.raw, n, sum);
    log_ratio.read(first, n, b.live, A(0), b.raw);
    advantages.read(first, n, b.live, A(0), b.advantage);
    weights.read(first, n, b.live, A(0), b.weight);
    low.read(first, n, b.live, A(0), b.low);
    high.read(first, n, b.live, A(0), b.high);
    cap.read(first, n, b.live, A(0), b.cap);
    if (p.power != 0)
      position = widen(b, mask ? mask + first : nullptr, n, position, A(p.power));
    if (p.trains)
      for (int64_t i = 0; i < n; ++i)
        b.live[i] = p.trains[first + i] ? b.live[i] : A(0);
    evaluate(Surrogate(p.surrogate), shared, b, n, A(p.clamp_low), A(p.clamp_high),
             gradient ? gradient + first : nullptr, totals);
  }
  for (int c = 0; c < loss_stats; ++c)
    p.stats[r * loss_stats + c] = std::accumulate(totals + c * lanes, totals + (c + 1) * lanes, 0.0);
  if (gradient)
    clear_padding(p.rows, r, gradient);
}

} // namespace

void policy_loss(const PolicyLoss &p, int threads) {
  with_float(p.type, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = accumulate_t<T>;
    parallel(p.rows.count, row_grain(p.rows.count, p.rows.size), threads, [&](int64_t first, int64_t last) {
      const auto b = std::make_unique<Block<A>>();
      for (int64_t r = first; r < last; ++r)
        row<T>(p, r, *b);
    });
  });
}

} // namespace tokcredit::cpu
