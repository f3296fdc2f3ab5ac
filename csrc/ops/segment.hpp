// Reductions of token values over rows, and of values over arbitrary ids.
//
// Every segment accumulates count, mean, second moment about it, minimum, maximum and log-sum-exp by merging
// the moments of fixed blocks in order, so the bits do not depend on the number of threads. Masked values are
// not read.
//
//     x 1 2 3 4   rows [0,3) [3,4)   sum 6 4   mean 2 4   var(ddof 1) 1 0
//
// Empty segments: sum, mean, var and count 0, minimum +inf, maximum -inf, logsumexp -inf. Time: one read.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

TOKCREDIT_ENUM(Reduction, sum, mean, var, minimum, maximum, count, logsumexp)

struct SegmentRows {
  Rows rows;
  Type type; // of x; for count any type, x is not read
  const void *x;
  Reduction reduction;
  double ddof;
  void *y; // [R] of the accumulation type
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
  void *y; // [segments]
};

namespace cpu {
void segment_rows(const SegmentRows &, int threads);
void segment_ids(const SegmentIds &);
} // namespace cpu
namespace cuda {
class Queue;
void segment_rows(const SegmentRows &, Queue &);
void segment_ids(const SegmentIds &, Queue &);
} // namespace cuda

} // namespace tokcredit
