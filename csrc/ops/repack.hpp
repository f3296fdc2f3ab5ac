// Rows of tokens moved from one layout to another.
//
//     y = 0;   for every row r: y[to[r] : to[r] + length[r]] = x[from[r] : from[r] + length[r]]
//
//     x a b c d   from 0 1   length 1 3   to 0 3   size 6   ->   y a 0 0 b c d
//
// The spans in y are disjoint and in increasing order. x and y are of one type. Time: one read of what is
// moved, one write of y.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

struct Repack {
  Type type;
  const void *x;
  const int64_t *from;   // [R]
  const int64_t *to;     // [R]
  const int64_t *length; // [R]
  int64_t rows;
  void *y;
  int64_t size;   // of y
  int64_t source; // size of x
};

namespace cpu {
void repack(const Repack &, int threads);
}
namespace cuda {
class Queue;
void repack(const Repack &, Queue &);
} // namespace cuda

} // namespace tokcredit
