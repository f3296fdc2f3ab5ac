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

// One operand seen from one row: a number per token, or `value` for all of them.
template <class A> struct Lane {
  const A *data; // null: `value`
  A value;

  Lane(const Operand &o, int64_t row) : data(nullptr), value(A(o.value)) {
    const A *given = static_cast<const A *>(o.data);
    if (given && o.per == Per::token)
      data = given;
    else if (given)
      value = given[o.per == Per::row ? row : 0];
  }

  // Once per row.
  void begin(A *out) const {
    if (!data)
      for (int64_t i = 0; i < block; ++i)
        out[i] = value;
  }

  // Once per block: its own numbers, 0 where masked.
  void read(int64_t first, int64_t n, const A *live, A *out) const {
    if (data)
      for (int64_t i = 0; i < n; ++i)
        out[i] = live[i] != A(0) ? data[first + i] : A(0);
  }
};

// Up to `block` tokens of a row. `live` is 0 where masked and after the last, and whatever the arguments hold
// where masked has been replaced by 0.
template <class A> struct Block {
  uint8_t unmasked[block];
  A live[block], log_prob[block], reference[block], log_ratio[block], advantage[block], weight[block],
      low[block], high[block], cap[block], outside_low[block], outside_high[block], given[block],
      width[block];
};

inline bool any_unmasked(const uint8_t (&unmasked)[block]) {
  uint64_t found = 0, eight;
  for (int64_t i = 0; i < block; i += 8) {
    __builtin_memcpy(&eight, unmasked + i, 8);
    found |= eight;
  }
  return found;
}

// The operands of one row, each with its place in a block.
template <class A> struct Lanes {
  struct Place {
    Lane<A> lane;
    A *out;
  };
  Place all[9];
  int count;

  Lanes(const PolicyLoss &p, int64_t r, Block<A> &b)
      : all{{{p.advantages, r}, b.advantage},
            {{p.weights, r}, b.weight},
            {{p.low, r}, b.low},
            {{p.high, r}, b.high},
            {{p.cap, r}, b.cap},
            {{p.log_ratio, r}, b.log_ratio},
            {{p.outside_low, r}, b.outside_low},
            {{p.outside_high, r}, b.outside_high},
            {{p.given, r}, b.given}},
        count(p.surrogate == Surrogate::gated ? 9
              : p.source == Source::given     ? 6
                                              : 5) {
    for (int i = 0; i < count; ++i)
      all[i].lane.begin(all[i].out);
  }

  // Whether the bounds are the same for all tokens.
  bool share_bounds() const { return !all[2].lane.data && !all[3].lane.data && !all[4].lane.data; }

  void read(int64_t first, int64_t n, const A *live) const {
    for (int i = 0; i < count; ++i)
      all[i].lane.read(first, n, live, all[i].out);
  }
};

// Numbers as they are computed in, 0 where masked.
template <class T, class A> void read(const T *x, int64_t n, const A *live, A *out) {
  for (int64_t i = 0; i < n; ++i) {
    const A value = load(x[i]);
    out[i] = live[i] != A(0) ? value : A(0);
  }
}

// As log-ratio the sum of the differences up to each token, after `before`; returns the last.
template <class A> double accumulate_differences(Block<A> &b, int64_t n, A bound, double before) {
  const int64_t whole = (n + at_once - 1) / at_once * at_once;
  for (int64_t i = 0; i < whole; ++i) {
    const A difference = bounded(A(b.log_prob[i] - b.reference[i]), -bound, bound);
    b.log_ratio[i] = i < n ? difference : A(0);
  }
  return run_forward(b.log_ratio, whole, before);
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
  Count<A> tokens, below, above, capped, nonfinite;

  void write(double *stats) const {
    double sums[3] = {};
    for (int64_t k = 0; k < lanes; ++k) {
      sums[0] += value[k];
      sums[1] += ratio[k];
      sums[2] += divergence[k];
    }
    const double all[] = {sums[0],        tokens.total(), below.total(), above.total(),
                          capped.total(), sums[1],        sums[2],       nonfinite.total()};
    static_assert(sizeof all == loss_stats * sizeof(double), "one number for each");
    __builtin_memcpy(stats, all, sizeof all);
  }
};

// The surrogate of a block. Where all tokens share the bounds of `clip`, their exponentials are known
// beforehand, and have the same bits.
template <Surrogate kind, bool shared, class A>
void evaluate(const PolicyLoss &call, const Block<A> &b, int64_t n, A *slopes, Totals<A> &totals) {
  using P = Pack<A>;
  const PolicyLoss p = call; // a copy, which the stores below cannot change
  const P exp_low = exponential(b.low[0]), exp_high = exponential(b.high[0]), exp_cap = exponential(b.cap[0]);
  P value{}, ratio{}, divergence{};
  Count<A> tokens, below, above, capped, nonfinite;
  for (int64_t i = 0; i < n; i += lanes) {
    const mask_t<P> live = P(b.live + i) != P{};
    if (!any(live)) {
      if (slopes)
        P{}.store(slopes + i, n - i);
      continue;
    }
    const P log_prob(b.log_prob + i), reference(b.reference + i), log_ratio(b.log_ratio + i);
    const P difference = p.reference ? log_prob - reference : log_ratio;
    Token<P> t{p.source == Source::difference ? difference : log_ratio,
               difference,
               log_prob,
               reference,
               P(b.advantage + i),
               P(b.low + i),
               P(b.high + i),
               P(b.cap + i),
               P(b.outside_low + i),
               P(b.outside_high + i),
               P(b.given + i)};
    Outcome<P> out;
    if constexpr (shared) {
      const Clamped<P> c(t.log_ratio, p);
      const P q = exponential(c.x);
      const Stop<P> stop(t, c.x);
      out = clipped(t, c, stop, q, stop.pick(q, exp_low, exp_high, exp_cap));
    } else {
      const P width(b.width + i);
      t.low = t.low * width;
      t.high = t.high * width;
      t.cap = t.cap * width;
      out = surrogate<kind>(t, p);
    }
    spread_nan(out, p.reference ? difference : log_prob);
    const P weight(b.weight + i);
    value = value + choose(live, weight * out.value, P{});
    ratio = ratio + choose(live, out.ratio, P{});
    divergence = divergence + choose(live, out.ratio - 1 - out.log_ratio, P{});
    tokens.add(live);
    below.add(live & out.below);
    above.add(live & out.above);
    capped.add(live & out.capped);
    nonfinite.add(live & (log_prob - log_prob != P{}));
    if (slopes)
      choose(live, weight * out.slope, P{}).store(slopes + i, n - i);
  }
  value.add_to(totals.value);
  ratio.add_to(totals.ratio);
  divergence.add_to(totals.divergence);
  totals.tokens.add(tokens);
  totals.below.add(below);
  totals.above.add(above);
  totals.capped.add(capped);
  totals.nonfinite.add(nonfinite);
}

template <Surrogate kind, class T, class A> void row(const PolicyLoss &p, int64_t r, Block<A> &b) {
  const T *log_probs = static_cast<const T *>(p.log_probs), *reference = static_cast<const T *>(p.reference);
  A *slopes = static_cast<A *>(p.slopes);
  const Lanes<A> operands(p, r, b);
  const bool shared = kind == Surrogate::clip && p.power == 0 && operands.share_bounds();
  for (int64_t i = 0; i < block; ++i)
    b.width[i] = A(1);
  Totals<A> totals;
  double sum = 0;
  int64_t position = 0;
  for (int64_t first = p.rows.begin[r]; first < p.rows.end[r]; first += block) {
    const int64_t left = p.rows.end[r] - first, n = left < block ? left : block;
    read_mask(p.rows, first, n, b.unmasked);
    if (!any_unmasked(b.unmasked)) {
      if (slopes)
        std::fill(slopes + first, slopes + first + n, A(0));
      continue;
    }
    for (int64_t i = 0; i < block; ++i)
      b.live[i] = A(int32_t(b.unmasked[i]));
    read(log_probs + first, n, b.live, b.log_prob);
    if (reference)
      read(reference + first, n, b.live, b.reference);
    operands.read(first, n, b.live);
    if (p.source == Source::cumulative)
      sum = accumulate_differences(b, n, A(p.bound), sum);
    if (p.power != 0)
      position = widen(b, n, position, A(p.power));
    if (p.trains)
      for (int64_t i = 0; i < n; ++i)
        b.live[i] = p.trains[first + i] ? b.live[i] : A(0);
    A *out = slopes ? slopes + first : nullptr;
    shared ? evaluate<kind, kind == Surrogate::clip>(p, b, n, out, totals)
           : evaluate<kind, false>(p, b, n, out, totals);
  }
  double *stats = p.stats + r * loss_stats;
  totals.write(stats);
  static_cast<A *>(p.values)[r] = A(stats[int(LossStat::loss)]);
  if (slopes)
    clear_padding(p.rows, r, slopes);
}

// One row of slopes times `factor`, 0 staying 0.
template <class A> void scale(A *x, int64_t n, A factor) {
  for (int64_t i = 0; i < n; ++i) {
    const A scaled = x[i] * factor;
    x[i] = x[i] == A(0) ? x[i] : scaled;
  }
}

template <class A> void multiply(const A *x, A *__restrict y, int64_t n, A factor) {
  for (int64_t i = 0; i < n; ++i)
    y[i] = x[i] * factor;
}

template <class A> void scale_all(const ScaleRows &s, int64_t first, int64_t last) {
  const A *factor = static_cast<const A *>(s.factor), *x = static_cast<const A *>(s.x);
  A *y = static_cast<A *>(s.y);
  for (int64_t r = first; r < last; ++r) {
    const A by = factor[s.per_row ? r : 0];
    const int64_t begin = s.rows.begin[r], n = s.rows.end[r] - begin;
    if (!s.in_place()) {
      multiply(x + begin, y + begin, n, by);
      clear_padding(s.rows, r, y);
    } else if (by != A(1)) {
      scale(y + begin, n, by);
    }
  }
}

} // namespace

namespace TOKCREDIT_LEVEL {

void policy_loss_rows(const PolicyLoss &p, int64_t first, int64_t last) {
  with_float(p.type, [&](auto t) {
    using T = typename decltype(t)::type;
    with_surrogate(p.surrogate, [&](auto kind) {
      Block<accumulate_t<T>> b{};
      for (int64_t r = first; r < last; ++r)
        row<decltype(kind)::value, T>(p, r, b);
    });
  });
}

void scale_rows(const ScaleRows &s, int64_t first, int64_t last) {
  s.type == Type::f64 ? scale_all<double>(s, first, last) : scale_all<float>(s, first, last);
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
