// Rows that share prefixes, packed so that each distinct token is computed once.
//
// A full row is the row's context followed by the row, cut after its last wanted token (the mask of `rows`);
// a row that wants nothing is left out. Rows are cut into bins, and each bin holds the prefix tree of its
// rows in depth-first order, children by first appearance. The last token of a leaf is a target only and has
// no place; every other token of the tree has one. A prediction is a wanted token of the tree together with
// the place before it. Tokens are equal if their ids are, and their tags if there are any.
//
//     contexts p q (all rows), rows: a b c | a b d e | f g, all wanted
//     place            0 1 2 3 4 5
//     tokens           p q a b d f       c, e and g are the last tokens of leaves
//     segments         [0, 2) [2, 5) [5, 6)   parent -1 1 1   end 6 5 6   depth 0 2 2
//     predictions      source 1 2 3 3 4 1 5   target a b c d e f g
//     index            0 1 2 | 0 1 3 4 | 5 6
//
// A segment is a maximal run of places in which only the last one may have several children; a first token,
// which has no parent, also begins one. `end` is one past the last place below a segment, so place j is i or
// an ancestor of i if and only if j <= i < end of j's segment.
//
// Bins are cut between rows in depth-first order so that places plus `bin_cost` per bin are fewest, which is
// a shortest path: rows j .. i - 1 in one bin have prefix[i] - prefix[j] + shared[j] places, where shared[j]
// are those that row j has in common with the row before. Rows with one `together` id go into one bin; they
// count as one row, and where they are not neighbours their sum of places is an upper bound. With several
// ranks the number of bins is a multiple of them as far as there are rows, and the largest bin is smallest.
//
// Time: one comparison per token of shared prefixes, and each result is written once.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

struct TreePack {
  Type type; // i32 or i64, of tokens and contexts
  Rows rows; // the mask says which tokens are wanted
  const void *tokens;
  const void *contexts;
  const int64_t *context_begin; // [R]
  const int64_t *context_end;   // [R]
  const int64_t *tags;          // [N] or null
  const int64_t *context_tags;  // of contexts, or null together with tags
  const int64_t *group;         // [R], dense: rows of a group are compared first; no result depends on it
  int64_t groups;
  const int64_t *together; // [R], any ids, or null
  int64_t budget;          // most places of a bin
  int64_t predictions;     // most predictions of a bin
  int64_t bin_cost;        // in places
  int64_t ranks;
};

TOKCREDIT_ENUM(TreePackError, none, predecessor, budget, predictions, size)

struct TreePackSizes {
  int64_t places;      // M
  int64_t predictions; // Q
  int64_t segments;    // S
  int64_t bins;        // B
  int64_t packed;      // rows in bins
  TreePackError error;
  int64_t row;    // at which the error is
  int64_t needed; // places or predictions
};

struct TreePackArrays {
  void *tokens;            // [M]
  int64_t *segment_begin;  // [S + 1]
  int64_t *segment_parent; // [S]
  int64_t *segment_end;    // [S]
  int64_t *segment_depth;  // [S]
  int32_t *source;         // [Q]
  int64_t *target;         // [Q]
  int32_t *index;          // [N] prediction of each token, -1 where not wanted
  int64_t *row_order;      // [packed], depth first, bin by bin
  int64_t *row_shared;     // [packed], tokens in common with the row before in the bin
  int32_t *row_bin;        // [R], -1 where not packed
  int64_t *row_length;     // [R], tokens of the full row
  int64_t *bin_places;     // [B + 1]
  int64_t *bin_predictions;
  int64_t *bin_rows;
};

namespace cpu {
class TreePlan; // everything but the arrays of places, predictions and tokens
TreePlan *tree_plan(const TreePack &, TreePackSizes &, int threads);
void tree_write(const TreePlan &, const TreePackArrays &, int threads);
void tree_free(TreePlan *);
} // namespace cpu

} // namespace tokcredit
