#include "ops/policy_loss.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "cpu/simd.hpp"
#include "math/dispatch.hpp"
#include "math/surrogate.hpp"
#include <limits>
#include <memory>

namespace tokcredit::cpu {
namespace {

constexpr int64_t block = 512;

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
// arguments hold there has been replaced by a harmless number; `trains` is 0 there and where nothing is paid.
template <class A> struct Block {
  A live[block], trains[block], raw[block], log_prob[block], advantage[block], weight[block], low[block],
      high[block], cap[block], width[block];
  A gradient[block], columns[loss_stats][block];
};

template <Surrogate kind, class A>
TOKCREDIT_INLINE void evaluate_body(Block<A> &b, int64_t n, A clamp_low, A clamp_high) {
  for (int64_t i = 0; i < n; ++i) {
    const A x = bounded(b.raw[i], clamp_low, clamp_high), w = b.width[i];
    const A live = b.trains[i];
    const Paid<A> paid = surrogate<kind, A>(
        {x, b.log_prob[i], b.advantage[i], b.low[i] * w, b.high[i] * w, b.cap[i] * w, x == b.raw[i]});
    b.gradient[i] = live != A(0) ? b.weight[i] * paid.gradient : A(0);
    b.columns[0][i] = live != A(0) ? b.weight[i] * paid.value : A(0);
    b.columns[1][i] = live;
    b.columns[2][i] = paid.below ? live : A(0);
    b.columns[3][i] = paid.above ? live : A(0);
    b.columns[4][i] = paid.capped ? live : A(0);
    b.columns[5][i] = live != A(0) ? paid.ratio : A(0);
    b.columns[6][i] = live != A(0) ? paid.ratio - A(1) - x : A(0);
  }
}

#define TOKCREDIT_EVALUATE(kind, A)                                                                          \
  TOKCREDIT_CLONES void kind##_##A(Block<A> &b, int64_t n, A low, A high) {                                  \
    evaluate_body<Surrogate::kind, A>(b, n, low, high);                                                      \
  }
#define TOKCREDIT_EVALUATE_ALL(A)                                                                            \
  TOKCREDIT_EVALUATE(clip, A)                                                                                \
  TOKCREDIT_EVALUATE(weighted, A)                                                                            \
  TOKCREDIT_EVALUATE(soft, A)                                                                                \
  TOKCREDIT_EVALUATE(k1, A)                                                                                  \
  TOKCREDIT_EVALUATE(k2, A)                                                                                  \
  TOKCREDIT_EVALUATE(k3, A)                                                                                  \
  void evaluate(Surrogate kind, Block<A> &b, int64_t n, A low, A high) {                                     \
    void (*const table[])(Block<A> &, int64_t, A, A) = {clip_##A, weighted_##A, soft_##A,                    \
                                                        k1_##A,   k2_##A,       k3_##A};                     \
    table[int(kind)](b, n, low, high);                                                                       \
  }
TOKCREDIT_EVALUATE_ALL(float)
TOKCREDIT_EVALUATE_ALL(double)
#undef TOKCREDIT_EVALUATE_ALL
#undef TOKCREDIT_EVALUATE

// What a row has summed up so far.
struct Running {
  double log_ratio = 0;
  int64_t position = 0;
};

template <class T, class A>
void accumulate(const PolicyLoss &p, const T *reference, int64_t n, Block<A> &b, Running &run) {
  const A bound = A(p.bound);
  for (int64_t i = 0; i < n; ++i) {
    if (b.live[i] != A(0))
      run.log_ratio += double(bounded(A(b.log_prob[i] - load(reference[i])), -bound, bound));
    b.raw[i] = A(run.log_ratio);
  }
}

// Leaves a masked token the width of the one before it.
template <class A> void widen(const PolicyLoss &p, int64_t n, Block<A> &b, Running &run) {
  for (int64_t i = 0; i < n; ++i)
    b.width[i] = A(run.position += b.live[i] != A(0));
  for (int64_t i = 0; i < n; ++i)
    b.width[i] = growth(b.width[i], A(p.power));
}

template <class T, class A> void row(const PolicyLoss &p, int64_t r, Block<A> &b) {
  const A infinity = std::numeric_limits<A>::infinity();
  const T *log_probs = static_cast<const T *>(p.log_probs), *reference = static_cast<const T *>(p.reference);
  A *gradient = static_cast<A *>(p.gradient);
  const bool *mask = p.rows.mask;
  const Lane<A> log_ratio(p.log_ratio, r, 0), advantages(p.advantages, r, 1), weights(p.weights, r, 1),
      low(p.low, r, -infinity), high(p.high, r, infinity), cap(p.cap, r, infinity);
  const bool subtract = reference && !p.log_ratio.data && !p.cumulative;
  Running run;
  std::fill(b.live, b.live + block, A(1));
  std::fill(b.trains, b.trains + block, A(1));
  log_ratio.begin(b.raw);
  advantages.begin(b.advantage);
  weights.begin(b.weight);
  low.begin(b.low);
  high.begin(b.high);
  cap.begin(b.cap);
  std::fill(b.width, b.width + block, A(1));
  double stats[loss_stats] = {};
  for (int64_t first = p.rows.begin[r]; first < p.rows.end[r]; first += block) {
    const int64_t n = std::min(block, p.rows.end[r] - first);
    if (mask)
      for (int64_t i = 0; i < n; ++i)
        b.live[i] = A(mask[first + i]);
    if (p.trains)
      for (int64_t i = 0; i < n; ++i)
        b.trains[i] = A(p.trains[first + i] && b.live[i] != A(0));
    else if (mask)
      std::copy(b.live, b.live + n, b.trains);
    for (int64_t i = 0; i < n; ++i)
      b.log_prob[i] = b.live[i] != A(0) ? A(load(log_probs[first + i])) : A(0);
    if (subtract)
      for (int64_t i = 0; i < n; ++i)
        b.raw[i] = b.live[i] != A(0) ? b.log_prob[i] - load(reference[first + i]) : A(0);
    else if (p.cumulative)
      accumulate(p, reference + first, n, b, run);
    else
      log_ratio.read(first, n, b.live, A(0), b.raw);
    advantages.read(first, n, b.live, A(0), b.advantage);
    weights.read(first, n, b.live, A(0), b.weight);
    low.read(first, n, b.live, A(0), b.low);
    high.read(first, n, b.live, A(0), b.high);
    cap.read(first, n, b.live, A(0), b.cap);
    if (p.power != 0)
      widen(p, n, b, run);
    evaluate(Surrogate(p.surrogate), b, n, A(p.clamp_low), A(p.clamp_high));
    for (int c = 0; c < loss_stats; ++c) {
      std::fill(b.columns[c] + n, b.columns[c] + block, A(0));
      stats[c] += fold(b.columns[c], block);
    }
    if (gradient)
      std::copy(b.gradient, b.gradient + n, gradient + first);
  }
  std::copy(stats, stats + loss_stats, p.stats + r * loss_stats);
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
