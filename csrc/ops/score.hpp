// Scores of tokens, and what they do to the bounds of a token's ratio and to its advantage. NaN gives NaN.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

// The distance of the logarithm from a quantile, as a share of the largest distance on its side. With mean,
// minimum and maximum over the unmasked tokens of all rows:
//     v = log(max(x, floor)),   Q = the v of rank round(quantile (number of tokens - 1)), halves to even
//     s = sqrt(max(mean((v - Q)^2), floor)),   d = v - Q
//     y = d / max(max(d), floor * s) if d > 0, else d / max(-min(d), floor * s)
// With `positive` the sign of the second case is turned. Masked tokens and padding get some number.
//
//     x 1 e e^2 e^4   quantile .5   y -1 -.5 0 1   positive 1 .5 0 1
//
// Must read and write: x, y once; reads y three times more, and selects from it.
struct LogDeviation {
  Rows rows;
  Type type; // of x
  const void *x;
  double quantile; // from 0 to 1
  double floor;
  bool positive;
  void *y;            // [N] of the accumulation type
  double *statistics; // [4]: Q, s, and the least and the largest d / s, both away from 0
};

// Clip ranges one of which is widened by the score h, as bounds of the log-ratio:
//     below[t] = log(max(1 - low (1 - widen min(h, 0)), 0)),   above[t] = log(1 + high (1 + widen max(h, 0)))
//
//     h -1 0 1   low .2   high .2   widen 1   exp(below) .6 .8 .8   exp(above) 1.2 1.2 1.4
//
// Must read and write: score, below, above once.
struct ScoreBounds {
  Type type; // f32 or f64
  const void *score;
  double low;
  double high;
  double widen;
  int64_t size;
  void *below;
  void *above;
};

// Advantages times a factor that depends on whether the ratio q lies in the inner half of its bounds:
//     y[t] = advantages[row] (1 + strength h) if (h > 0 and not inner) or (not h > 0 and inner), else
//     advantages[row]
// and 0 outside of rows, where log q = clamp(log_probs - reference, clamp_low, clamp_high) and `inner` is
// 1 - below / 2 < q < 1 + above / 2. The clip ranges `below` and `above` are those that
// widen with the score, as in ScoreBounds, or where bounds of the log-ratio are given 1 - exp(low) and
// exp(high) - 1.
//
//     h .5 .5 -.5 -.5   q 1 1.2 1 1.2   low .2   high .2   widen 0   strength 1   advantages 2   y 2 3 1 2
//
// Must read and write: score, log_probs, reference, given bounds, y once.
struct ScoreFactor {
  Rows rows; // the mask is not read
  Type type; // f32 or f64
  const void *score;
  const void *log_probs;
  const void *reference;  // [N], or null for 0
  const void *advantages; // [R]
  const void *low_bound;  // [N], or null for both
  const void *high_bound; // [N]
  double low;
  double high;
  double widen;
  double strength;
  double clamp_low, clamp_high;
  void *y;
};

namespace cpu {
void log_deviation(const LogDeviation &, int threads);
void score_bounds(const ScoreBounds &, int threads);
void score_factor(const ScoreFactor &, int threads);
} // namespace cpu
namespace cuda {
class Queue;
void log_deviation(const LogDeviation &, Queue &);
void score_bounds(const ScoreBounds &, Queue &);
void score_factor(const ScoreFactor &, Queue &);
} // namespace cuda

} // namespace tokcredit
