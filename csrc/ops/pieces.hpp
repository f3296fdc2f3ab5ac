// Rows cut into pieces at marked tokens.
//
// before: a piece begins at every marked token, and the first one with the row, before which nothing is
//         marked.
// after:  a piece ends with every marked token, and the last one with the row.
// runs:   a piece is a maximal run of marked tokens; the other tokens belong to none.
//
// So a row with k marked tokens has k + 1 pieces, of which the first, or with `after` the last, may be empty;
// with `runs` it has as many as runs. at[p] is the marked token that piece p begins with, or with `after` the
// one that it ends with, and -1 where there is none.
//
//     marks 0 1 0 1 | 1 1   before [0, 1) [1, 3) [3, 4) | [4, 4) [4, 5) [5, 6)   at -1 1 3 | -1 4 5
//                           after  [0, 2) [2, 4) [4, 4) | [4, 5) [5, 6) [6, 6)   at 1 3 -1 | 4 5 -1
//                           runs   [1, 2) [3, 4)        | [4, 6)                 at 1 3 | 4
//
// First they are counted, which gives offset[r], the number of row r's first piece, and how many there are
// in all as offset[R]; then they are written. Must read each time: the marks once.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

TOKCREDIT_ENUM(Cut, before, after, runs)

struct PieceOffsets {
  Rows rows; // the mask holds the marks
  Cut cut;
  int64_t *offset; // [R + 1]
};

struct Pieces {
  Rows rows; // the mask holds the marks
  Cut cut;
  const int64_t *offset; // [R + 1]
  int64_t count;         // P
  int64_t *begin;        // [P]
  int64_t *end;          // [P]
  int64_t *row;          // [P]
  int64_t *at;           // [P]
};

namespace cpu {
void piece_offsets(const PieceOffsets &);
void pieces(const Pieces &);
} // namespace cpu
namespace cuda {
class Queue;
void piece_offsets(const PieceOffsets &, Queue &);
void pieces(const Pieces &, Queue &);
} // namespace cuda

} // namespace tokcredit
