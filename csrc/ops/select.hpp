// Exact selection inside scopes of rows: the k largest tokens, the value of a rank, the most varied subset.
//
// Row r belongs to scope[r] of `scopes` (outside that range: to none; null: all rows to scope 0). How many
// are wanted is a number for each scope, or a share of its tokens. Only unmasked tokens take part. Values
// are ordered by an integer key, so ranks are exact at any size: -0 equals 0, and NaN ranks above +inf. Ties
// go to the token that comes first.
//
//     x 3 1 3 2   one scope   k 2 -> 1 0 1 0     rank 1 (from the smallest, counted from 0) -> 2
//                 share .3, up -> 1 0 1 0     down -> 1 0 0 0
//
// Time: on the CPU one read of x to take out the values around the threshold, which a sample tells; where the
// sample misleads (many ties), and on CUDA, reads to find it digit by digit, on the CPU two or three (at most
// six for float64), on CUDA one for every eight bits of x. One more to mark. Where ties straddle the
// threshold, further reads place it.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

TOKCREDIT_ENUM(Rounding, down, up, nearest)

// number[scope], or where it is null share * (elements of the scope), rounded and at least `least`. Up and
// down leave out 1e-9, so that .7 of 10 is 7; halves go to the even number.
struct Quota {
  const int64_t *number; // [scopes] or null
  double share = 0;
  Rounding rounding = Rounding::down;
  int64_t least = 0;
};

struct Select {
  Rows rows;
  Type type;
  const void *x;
  const int64_t *scope; // [R] or null
  Quota wanted;         // how many tokens (top_k), or as a number which rank (kth)
  int64_t scopes;
};

// The subset of `wanted` rows of each scope whose population variance is largest: for some i the first i and
// the last wanted - i in descending order of x. Among equals the smallest such i, or with `largest` the first
// `wanted` if these are among them.
struct MaximumVariance {
  const double *x;      // [R]
  const int64_t *scope; // [R]
  Quota wanted;
  int64_t rows;
  int64_t scopes;
  bool largest;
  bool *chosen; // [R]
};

// The smallest tokens whose mean is at most a budget, of all rows together. In ascending order, ties in the
// order of the tokens, chosen are those before the first k for which the mean of k + 1 tokens exceeds the
// budget, and in any case the first `least`. NaN is never chosen. Sums are in double.
//
//     x .1 .9 .4 .3   budget .3 -> 1 0 1 1     least 4, budget 0 -> 1 1 1 1
//
// Must read: x, mask; must write: chosen. On CUDA tokens are sorted.
struct WithinMean {
  Rows rows;
  Type type; // f32 or f64
  const void *x;
  double budget;
  int64_t least;
  bool *chosen; // [N]
};

namespace cpu {
void top_k(const Select &, bool *chosen, int threads); // [N]
void kth(const Select &, void *values, int threads);   // [scopes] of x's accumulation type, NaN if none
void maximum_variance(const MaximumVariance &);
void within_mean(const WithinMean &);
} // namespace cpu
namespace cuda {
class Queue;
void top_k(const Select &, bool *chosen, Queue &);
void kth(const Select &, void *values, Queue &);
void maximum_variance(const MaximumVariance &, Queue &);
void within_mean(const WithinMean &, Queue &);
} // namespace cuda

} // namespace tokcredit
