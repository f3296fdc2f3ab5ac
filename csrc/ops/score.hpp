// What a score of each token does to the bounds of its ratio and to its advantage.
//
// Tokens are independent of each other, whatever rows they are in. NaN gives NaN.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

// The distance from a pivot, as a share of the largest distance on its side:
//     s = sqrt(max(var + (mean - pivot)^2, floor)),   d = x - pivot
//     y = d / max(maximum - pivot, floor * s) if d > 0, else d / max(pivot - minimum, floor * s)
// with the moments of x, of which var is that of the population. With `positive` the sign of the second case
// is turned.
//
//     x -2 0 1   pivot 0   y -1 0 1   positive 1 0 1
//
// Must read and write: x, y once.
struct Deviation {
  Type type; // f32 or f64, of x, pivot and y
  const void *x;
  const void *pivot;     // [1]
  const double *moments; // [5], in the order of Moment
  double floor;
  bool positive;
  int64_t size;
  void *y;
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

// A factor of advantages that depends on whether the ratio q lies in the inner half of its bounds:
//     inner = exp(low) < 2 q - 1 < exp(high)
//     y[t] = 1 + strength h if (h > 0 and not inner) or (not h > 0 and inner), else 1
// Bounds are one number or one per token.
//
//     h .5 .5 -.5 -.5   q 1 1.2 1 1.2   bounds log .8, log 1.2   strength 1   y 1 1.5 .5 1
//
// Must read and write: score, log_ratio, given bounds, y once.
struct ScoreFactor {
  Type type; // f32 or f64
  const void *score;
  const void *log_ratio;
  const void *low;  // [N] or null for low_number
  const void *high; // [N] or null for high_number
  double low_number;
  double high_number;
  double strength;
  int64_t size;
  void *y;
};

namespace cpu {
void deviation(const Deviation &, int threads);
void score_bounds(const ScoreBounds &, int threads);
void score_factor(const ScoreFactor &, int threads);
} // namespace cpu
namespace cuda {
class Queue;
void deviation(const Deviation &, Queue &);
void score_bounds(const ScoreBounds &, Queue &);
void score_factor(const ScoreFactor &, Queue &);
} // namespace cuda

} // namespace tokcredit
