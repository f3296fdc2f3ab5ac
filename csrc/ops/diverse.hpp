// Greedy choice of tokens that are important and unlike each other. In each row:
//     first:  the largest score
//     then:   the largest worth,  nearest[t] = largest cosine of x[t] with the vectors chosen so far
//         sum:      worth[t] = weight * score[t] - (1 - weight) * nearest[t]
//         product:  worth[t] = score[t] * (1 - nearest[t])                     (scores are at least 0)
// until `number[row]` tokens are chosen, or all. order[t] is the step at which t was chosen, from 0, or -1.
// Ties go to the token that comes first. A token whose score or squared norm is not finite is worth -inf.
//
//     score 1 .8 0 .4   x (1,0) (.9,.1) (0,1) (.7,.7)   number 2   weight .5   order 0 -1 1 -1
//
// cosine(a, b) = a.b / ((|a| + 1e-8) (|b| + 1e-8)), in float32.
//
// Time: number * N * d at most. Worth never grows, so a token whose last known worth is below the best of a
// step is not looked at. Memory: O(N), and on CUDA 8 bytes for each row and step.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

struct Diverse {
  Rows rows;     // at most 2^32 - 1 tokens
  Type type;     // f32, bf16 or f16
  const void *x; // [N, width]
  int64_t width;
  const float *score;    // [N]
  const int64_t *number; // [R]
  int64_t steps;         // the largest number that is honoured
  float weight;          // from 0 to 1
  bool product;
  int64_t *order; // [N]
};

namespace cpu {
void diverse(const Diverse &, int threads);
}
namespace cuda {
class Queue;
void diverse(const Diverse &, Queue &);
} // namespace cuda

} // namespace tokcredit
