// Reductions of token values over rows, and of values over arbitrary ids.
//
// Every segment accumulates count, mean, second moment about it, minimum, maximum and log-sum-exp by merging
// the moments of fixed blocks in order, so the bits do not depend on the number of threads. Masked values are
// not read.
//
//     x 1 2 3 4   rows [0,3) [3,4)   sum 6 4   mean 2 4   var(ddof 1) 1 0
//     moments(ddof 1)   3 2 1 1 3 | 1 4 0 4 4
//
// `moments` writes five float64 numbers per segment, in the order of Moment. Equal values have exactly their
// mean, and variance 0. Variance is the second moment divided by count - ddof, and 0 where that is not
// positive. Empty segments: sum, mean, var and count 0, minimum +inf, maximum -inf, logsumexp -inf. Must
// read: x once, mask once.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

TOKCREDIT_ENUM(Reduction, sum, mean, var, minimum, maximum, count, logsumexp, moments)
TOKCREDIT_ENUM(Moment, size, mean, var, minimum, maximum)

// Numbers that a reduction writes for each segment.
constexpr int64_t width_of(Reduction reduction) {
  return reduction == Reduction::moments ? int64_t(Moment::maximum) + 1 : 1;
}

struct SegmentRows {
  Rows rows;
  Type type; // of x; for count any type, x is not read
  const void *x;
  Reduction reduction;
  double ddof;
  void *y; // [R] of the accumulation type; for count int64, for moments [R, 5] float64
};

// The moments of rows whose tokens each count weights[t] times, which need not be whole; those of a weight of
// 0 or less, or NaN, do not count. `size` is the sum of the weights.
//
//     x 1 3   weights 3 1   moments(ddof 0)   4 1.5 .75 1 3
struct WeightedMoments {
  Rows rows;
  Type type; // f32 or f64, of x
  const void *x;
  const double *weights; // [N]
  double ddof;
  double *y; // [R, 5]
};

// Element i belongs to segment ids[i]; ids outside [0, segments) belong to none.
struct SegmentIds {
  Type type;
  const void *x;
  const int64_t *ids;
  const bool *mask; // or null
  int64_t size;
  int64_t segments;
  Reduction reduction;
  double ddof;
  void *y; // [segments], or [segments, 5], as above
};

// Each row's number held against the moments of its group, mean m, standard deviation s and size n, all in
// double:
//     centred        x - m
//     normalized     (x - m) / (s + epsilon)
//     scaled         x / (s + epsilon)
//     leave_one_out  (x - m) n / (n - 1)
// In a group of fewer than two rows m is 0, s is 1, and leave_one_out is 0.
//
//     x 1 3 5   groups 0 0 1   centred -1 1 5   leave_one_out -2 2 0
TOKCREDIT_ENUM(Standard, centred, normalized, scaled, leave_one_out)

struct Standardize {
  Type type; // f32 or f64, of x
  const void *x;
  const int64_t *group;  // [M], below `groups`
  const double *moments; // [groups, 5], in the order of Moment
  int64_t size;
  int64_t groups;
  Standard standard;
  double epsilon;
  Type result; // f32 or f64, of y
  void *y;     // [M]
};

// A linear function of each row at its tokens, in double: y[t] = factor[r] x[t] + shift[r] where the token is
// unmasked, and 0 elsewhere. As a bool, whether that number lies between two others: low < y[t] < high.
//
//     x 1 2 3 | 4   mask 1 0 1 | 1   factor 2 -1   shift 1 0   y 3 0 7 | -4   low 0, high 5   1 0 0 | 0
//
// Must read: x, mask; must write: y.
struct RowAffine {
  Rows rows;
  Type type; // f32 or f64, of x
  const void *x;
  const double *factor; // [R], or one number
  const double *shift;
  bool per_row;
  double low, high; // read where y is bool
  Type result;      // f32, f64 or b8, of y
  void *y;          // [N]
};

namespace cpu {
void segment_rows(const SegmentRows &, int threads);
void weighted_moments(const WeightedMoments &);
void segment_ids(const SegmentIds &);
void standardize(const Standardize &);
void row_affine(const RowAffine &, int threads);
} // namespace cpu
namespace cuda {
class Queue;
void segment_rows(const SegmentRows &, Queue &);
void weighted_moments(const WeightedMoments &, Queue &);
void segment_ids(const SegmentIds &, Queue &);
void standardize(const Standardize &, Queue &);
void row_affine(const RowAffine &, Queue &);
} // namespace cuda

} // namespace tokcredit
