// The one operation with a policy gradient: in one pass over the tokens, the weighted surrogate of each row
// and its derivative with respect to each token's log-prob.
//
// For every unmasked token t of row r, with l = log_probs[t], o = reference[t], A = advantages:
//     difference = l - o                            (without a reference the given log_ratio, or else 0)
//     x = clamp(log_ratio, clamp_low, clamp_high)   where log_ratio is, by `source`,
//         difference: difference
//         given:      the operand log_ratio
//         cumulative: the sum of difference, each within [-bound, bound], over the row's tokens up to t
//     width = (number of the row's tokens up to t) ^ power;   low, high and cap are multiplied by it
//     values[r] += weights * value;   slopes[t] = weights * slope        (the table below; q = exp(x))
// slopes is 0 elsewhere. `slope` is the derivative with respect to the token's own l only, whatever the
// log-ratio was made of. Tokens that do not train (`trains` false) count in sums along the row and in
// positions, and in nothing else.
//
//     surrogate      value                                          slope
//     clip           max(-A q, -A exp(clamp(x, low, high))),        -A q, or 0 where a bound holds the value
//                    for A < 0 at most -A exp(cap)
//     soft           -(4 / tau) s A,  s = sigmoid(tau (q - 1)),     -4 s (1 - s) q A
//                    tau = high where A > 0, else low
//     gated          see below
//     k1             A u                                            A
//     k2             A u^2 / 2                                      A u
//     k3             A (exp(-u) + u - 1)                            A (1 - exp(-u))
//     abs            A |u|                                          A sign(u), 0 at u = 0
//     k3_corrected   A q (exp(-u) + u - 1)                          A q u;  q = 1 where source is difference
//
// The last five estimate KL(policy || reference) from u = clamp(difference, clamp_low, clamp_high). Where the
// estimate without A exceeds `limit`, the value is held there and the slope is 0. In all but `gated` the
// slope is 0 where the clamp holds x (u for the KL kinds).
//
// gated: a coordinate c decides on which side of its window a token is, a weight w multiplies its score.
//     c = x                                  on ratio
//         difference                         on difference
//         exp(l) - exp(o)                    on probability
//         sign(l - o) B                      on binary_kl, the KL divergence of "this token or another":
//                                            B = exp(o) (o - l) + (1 - exp(o)) log((1 - exp(o)) / (1 -
//                                            exp(l))) with 1e-8 added to both numbers under the logarithm
//         sign(l - o) given                  on given
//     below = c < low and (A < 0 or both_sides);   above = c > high and (A > 0 or both_sides)
//     w = exp(min(x, cap));  on ratio: exp(low) where below, exp(high) where above
//     k = outside_low where below, outside_high where above, else 1
//     slope = -A k w, and 0 where k is 0
//     value = slope * l  (score)    slope  (ratio)    -A w  (whole)
//
// NaN: where l, o, A, the weight, the log-ratio or the coordinate is NaN, or o and l are the same infinity,
// the row's value and the token's slope are NaN, whatever the surrogate; with a cumulative log-ratio so are
// the slopes of the row's later tokens. Infinities go through the formulas. Nothing under a false mask is
// read into a result.
//
// stats[r] holds in float64, over the tokens of the row that train: loss (values[r]), tokens, below and above
// (tokens that the lower or upper bound stopped; for gated, tokens outside on a side that is watched), capped
// (that the cap stopped; for gated, whose weight it held), ratio (sum of q), divergence (sum of q - 1 - x),
// nonfinite (log-probs that are infinite or NaN).
//
//     clip   log_probs -1 -1   reference -1 -1.5   A 2   weights 0.5   low, high log 0.8, log 1.2
//            q 1 1.65          value -2 -2.4       slopes -1 0         values -2.2
//
// Each Operand is one number, one per row, or one per token. Sums along a row are kept in double.
// Must read: every tensor once. Must write: slopes once.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

TOKCREDIT_ENUM(Surrogate, clip, soft, gated, k1, k2, k3, abs, k3_corrected)
TOKCREDIT_ENUM(Source, difference, given, cumulative)
TOKCREDIT_ENUM(Coordinate, ratio, difference, probability, binary_kl, given)
TOKCREDIT_ENUM(GatedValue, score, ratio, whole)
TOKCREDIT_ENUM(LossStat, loss, tokens, below, above, capped, ratio, divergence, nonfinite)
constexpr int loss_stats = int(LossStat::nonfinite) + 1;

enum class Per : int32_t { batch, row, token };

// `value` where data is null, for every token then.
struct Operand {
  const void *data;
  Per per;
  double value;
};

struct PolicyLoss {
  Rows rows;
  const bool *trains;    // [N], or null: every unmasked token
  Type type;             // of log_probs and reference; the operands are its accumulation type
  const void *log_probs; // [N]
  const void *reference; // [N] or null; not null where the source is cumulative, or the coordinate needs o
  Operand log_ratio;     // read where the source is given
  Operand advantages, weights, low, high, cap;
  Operand outside_low, outside_high, given; // gated only
  Surrogate surrogate;
  Source source;
  Coordinate on;
  GatedValue gated_value;
  bool both_sides;
  double bound;
  double power;
  double limit;
  double clamp_low, clamp_high;
  void *values;  // [R] of the accumulation type
  double *stats; // [R, loss_stats]
  void *slopes;  // [N] of the accumulation type, or null
};

// Multiplies the tokens of each row by one number: y[t] = x[t] factor[r], and 0 outside of rows.
//
// In place (y is x) this scales slopes: an x of 0 stays 0, whatever the factor, so nothing comes out from
// under a mask; rows whose factor is 1, and tokens outside of rows, are not touched.
//
//     x 1 2 | 3 0   factor 1 and inf   y 1 2 | inf NaN   in place 1 2 | inf 0
//
// Must read: factor, x; must write: y; in place only in rows whose factor is not 1.
struct ScaleRows {
  Rows rows; // the mask is not read
  Type type; // f32 or f64, of x, factor and y
  const void *x;
  const void *factor; // [R], or one number
  bool per_row;
  void *y;

  constexpr bool in_place() const { return x == y; }
};

namespace cpu {
void policy_loss(const PolicyLoss &, int threads);
void scale_rows(const ScaleRows &, int threads);
} // namespace cpu
namespace cuda {
class Queue;
void policy_loss(const PolicyLoss &, Queue &);
void scale_rows(const ScaleRows &, Queue &);
} // namespace cuda

} // namespace tokcredit
