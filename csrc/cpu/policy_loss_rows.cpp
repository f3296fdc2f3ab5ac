#include "cpu/policy_loss_rows.hpp"
#include "cpu/pack.hpp"
#include "cpu/rows.hpp"
#include "cpu/running.hpp"
#include "math/dispatch.hpp"
#include "math/surrogate.hpp"

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
      for (int64_t i = 0; i < block; ++i)
        out[i] = data ? *data : fallback;
  }

  // Once per block: its own numbers, with a harmless one where masked.
  void read(int64_t first, int64_t n, const A *live, A harmless, A *out) const {
    if (per_token())
      for (int64_t i = 0; i < n; ++i)
        out[i] = live[i] != A(0) ? data[first + i] : harmless;
  }
};

// Up to `block` tokens of a row. `live` is 0 where masked and after the last, and whatever the arguments hold
// where masked has been replaced by a harmless number.
template <class A> struct Block {
  uint8_t unmasked[block];
  A live[block], raw[block], log_prob[block], advantage[block], weight[block], low[block], high[block],
      cap[block], width[block];
};

// log_prob, 0 where masked.
template <class T, class A> void read(Block<A> &b, const T *log_probs, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A x = load(log_probs[i]);
    b.log_prob[i] = b.live[i] != A(0) ? x : A(0);
  }
}

// As raw the difference to the reference within `bound`, 0 where masked.
template <class T, class A>
void read_difference(Block<A> &b, const T *log_probs, const T *reference, int64_t n, A bound) {
  for (int64_t i = 0; i < n; ++i) {
    const A x = bounded(A(load(log_probs[i]) - load(reference[i])), -bound, bound);
    b.raw[i] = b.live[i] != A(0) ? x : A(0);
  }
}

// Positions counted from `before`, raised to `power`; a masked token has the width of the one before it.
template <class A> int64_t widen(Block<A> &b, int64_t n, int64_t before, A power) {
  for (int64_t i = 0; i < n; i += 8) {
    // Each byte of the product is the sum of the bytes up to it.
    uint64_t eight;
    __builtin_memcpy(&eight, b.unmasked + i, 8);
    eight *= 0x0101010101010101u;
    __builtin_memcpy(b.unmasked + i, &eight, 8);
    for (int64_t k = 0; k < 8; ++k)
      b.width[i + k] = A(before) + A(int32_t(b.unmasked[i + k]));
    before += int64_t(eight >> 56);
  }
  if (power == A(0.5))
    for (int64_t i = 0; i < n; ++i)
      b.width[i] = std::sqrt(b.width[i]);
  else
    for (int64_t i = 0; i < n; ++i)
      b.width[i] = growth(b.width[i], power);
  return before;
}

// Sums over the tokens of a row.
template <class A> struct Totals {
  double value[lanes] = {}, ratio[lanes] = {}, divergence[lanes] = {};
  Count<A> tokens, below, above, capped;

  void write(double *stats) const {
    double sums[3] = {};
    for (int64_t k = 0; k < lanes; ++k) {
      sums[0] += value[k];
      sums[1] += ratio[k];
      sums[2] += divergence[k];
    }
    const double all[loss_stats] = {sums[0],        tokens.total(), below.total(), above.total(),
                                    capped.total(), sums[1],        sums[2]};
    __builtin_memcpy(stats, all, sizeof all);
  }
};

// The surrogate of a block. Where all tokens share the bounds, their exponentials are known beforehand, and
// have the same bits.
template <Surrogate kind, bool shared, class A>
void evaluate(const Block<A> &b, int64_t n, A clamp_low, A clamp_high, A *gradient, Totals<A> &totals) {
  using P = Pack<A>;
  const P low(b.low), high(b.high), cap(b.cap);
  const P exp_low = exponential(b.low[0]), exp_high = exponential(b.high[0]), exp_cap = exponential(b.cap[0]);
  P value{}, ratio{}, divergence{};
  Count<A> tokens, below, above, capped;
  for (int64_t i = 0; i < n; i += lanes) {
    const mask_t<P> live = P(b.live + i) != P{};
    const P raw(b.raw + i), x = bounded(raw, P(clamp_low), P(clamp_high)), weight(b.weight + i);
    Token<P> t{x, P(b.log_prob + i), P(b.advantage + i), low, high, cap, x == raw};
    Paid<P> paid;
    if constexpr (shared) {
      const P q = exponential(x);
      const Stop<P> stop(t);
      paid = clipped(t, stop, q, stop.pick(q, exp_low, exp_high, exp_cap));
    } else {
      const P width(b.width + i);
      t.low = P(b.low + i) * width;
      t.high = P(b.high + i) * width;
      t.cap = P(b.cap + i) * width;
      paid = surrogate<kind>(t);
    }
    value = value + choose(live, weight * paid.value, P{});
    ratio = ratio + choose(live, paid.ratio, P{});
    divergence = divergence + choose(live, paid.ratio - 1 - x, P{});
    tokens.add(live);
    below.add(live & paid.below);
    above.add(live & paid.above);
    capped.add(live & paid.capped);
    if (gradient)
      choose(live, weight * paid.gradient, P{}).store(gradient + i, n - i);
  }
  value.add_to(totals.value);
  ratio.add_to(totals.ratio);
  divergence.add_to(totals.divergence);
  totals.tokens.add(tokens);
  totals.below.add(below);
  totals.above.add(above);
  totals.capped.add(capped);
}

template <class A>
void evaluate(Surrogate kind, bool shared, const Block<A> &b, int64_t n, A low, A high, A *gradient,
              Totals<A> &totals) {
  switch (kind) {
  case Surrogate::clip:
    return shared ? evaluate<Surrogate::clip, true>(b, n, low, high, gradient, totals)
                  : evaluate<Surrogate::clip, false>(b, n, low, high, gradient, totals);
  case Surrogate::weighted:
    return evaluate<Surrogate::weighted, false>(b, n, low, high, gradient, totals);
  case Surrogate::soft:
    return evaluate<Surrogate::soft, false>(b, n, low, high, gradient, totals);
  case Surrogate::k1:
    return evaluate<Surrogate::k1, false>(b, n, low, high, gradient, totals);
  case Surrogate::k2:
    return evaluate<Surrogate::k2, false>(b, n, low, high, gradient, totals);
  case Surrogate::k3:
    return evaluate<Surrogate::k3, false>(b, n, low, high, gradient, totals);
  }
}

template <class T, class A> void row(const PolicyLoss &p, int64_t r, Block<A> &b) {
  const A infinity = A(INFINITY);
  const T *log_probs = static_cast<const T *>(p.log_probs);
  const T *reference = p.log_ratio.data ? nullptr : static_cast<const T *>(p.reference);
  A *gradient = static_cast<A *>(p.gradient);
  const Lane<A> log_ratio(p.log_ratio, r, 0), advantages(p.advantages, r, 1), weights(p.weights, r, 1),
      low(p.low, r, -infinity), high(p.high, r, infinity), cap(p.cap, r, infinity);
  const bool shared = p.power == 0 && !low.per_token() && !high.per_token() && !cap.per_token();
  const A bound = p.cumulative ? A(p.bound) : infinity;
  advantages.begin(b.advantage);
  weights.begin(b.weight);
  low.begin(b.low);
  high.begin(b.high);
  cap.begin(b.cap);
  for (int64_t i = 0; i < block; ++i)
    b.width[i] = A(1);
  Totals<A> totals;
  double sum = 0;
  int64_t position = 0;
  for (int64_t first = p.rows.begin[r]; first < p.rows.end[r]; first += block) {
    const int64_t left = p.rows.end[r] - first, n = left < block ? left : block;
    read_mask(p.rows, first, n, b.unmasked);
    for (int64_t i = 0; i < block; ++i)
      b.live[i] = A(int32_t(b.unmasked[i]));
    // The other surrogates are of the ratio alone.
    if (Surrogate(p.surrogate) == Surrogate::weighted)
      read(b, log_probs + first, n);
    if (reference)
      read_difference(b, log_probs + first, reference + first, n, bound);
    else
      log_ratio.begin(b.raw);
    if (p.cumulative) {
      for (int64_t i = n; i % at_once; ++i)
        b.raw[i] = A(0);
      sum = run_forward(b.raw, (n + at_once - 1) / at_once * at_once, sum);
    }
    log_ratio.read(first, n, b.live, A(0), b.raw);
    advantages.read(first, n, b.live, A(0), b.advantage);
    weights.read(first, n, b.live, A(0), b.weight);
    low.read(first, n, b.live, A(0), b.low);
    high.read(first, n, b.live, A(0), b.high);
    cap.read(first, n, b.live, A(0), b.cap);
    if (p.power != 0)
      position = widen(b, n, position, A(p.power));
    if (p.trains)
      for (int64_t i = 0; i < n; ++i)
        b.live[i] = p.trains[first + i] ? b.live[i] : A(0);
    evaluate(Surrogate(p.surrogate), shared, b, n, A(p.clamp_low), A(p.clamp_high),
             gradient ? gradient + first : nullptr, totals);
  }
  totals.write(p.stats + r * loss_stats);
  if (gradient)
    clear_padding(p.rows, r, gradient);
}

} // namespace

namespace TOKCREDIT_LEVEL {

void policy_loss_rows(const PolicyLoss &p, int64_t first, int64_t last) {
  with_float(p.type, [&](auto t) {
    using T = typename decltype(t)::type;
    Block<accumulate_t<T>> b{};
    for (int64_t r = first; r < last; ++r)
      row<T>(p, r, b);
  });
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
