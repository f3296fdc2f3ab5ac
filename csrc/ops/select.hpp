// Exact selection inside scopes of rows: the k largest tokens, the value of a rank, the most varied subset.
//
// Row r belongs to scope[r] of `scopes` (outside that range: to none). Only unmasked tokens take part. Values
// are ordered by an integer key, so ranks are exact at any size: -0 equals 0, and NaN ranks above +inf. Ties
// go to the token that comes first.
//
//     x 3 1 3 2   one scope   k 2 -> 1 0 1 0     rank 1 (from the smallest, counted from 0) -> 2
//
// Time: on the CPU one read of x to take out the values around the threshold, which a sample tells; where the
// sample misleads (many ties), and on CUDA, reads to find it digit by digit, on the CPU two or three (at most
// six for float64), on CUDA one for every eight bits of x. One more to mark. Where ties straddle the
// threshold, further reads place it.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

struct Select {
  Rows rows;
  Type type;
  const void *x;
  const int64_t *scope;  // [R]
  const int64_t *wanted; // [scopes]: how many tokens (top_k), or which rank (kth)
  int64_t scopes;
};

// The subset of `wanted` rows of each scope whose population variance is largest: for some i the first i and
// the last wanted - i in descending order of x. Among equals the smallest such i, or with `largest` the first
// `wanted` if these are among them.
struct MaximumVariance {
  const double *x;       // [R]
  const int64_t *scope;  // [R]
  const int64_t *wanted; // [scopes]
  int64_t rows;
  int64_t scopes;
  bool largest;
  bool *chosen; // [R]
};

namespace cpu {
void top_k(const Select &, bool *chosen, int threads); // [N]
void kth(const Select &, void *values, int threads);   // [scopes] of x's accumulation type, NaN if none
void maximum_variance(const MaximumVariance &);
} // namespace cpu
namespace cuda {
class Queue;
void top_k(const Select &, bool *chosen, Queue &);
void kth(const Select &, void *values, Queue &);
void maximum_variance(const MaximumVariance &, Queue &);
} // namespace cuda

} // namespace tokcredit
