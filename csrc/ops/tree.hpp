// Grouped rollouts as radix trees, one tree per group.
//
// A node is a maximal run of tokens shared by one set of rows. Each group has exactly one root: the tokens
// that all its rows share, possibly none (length 0). Rows are compared by token id up to their own end, so a
// row that is a prefix of another ends at an inner node, and equal rows end at the same node. A group of G
// rows has at most 2G - 1 nodes; arrays over nodes have a fixed capacity of 2R, slots from `size` on are
// unused (parent -1, everything else 0). Nodes are numbered by first appearance, walking the rows in order
// from root to leaf, so a parent comes before its children.
//
//     row 0: a b c E      node  0: "a" (depth 0)   rows 0 1 2   parent -1
//     row 1: a b d E      node  1: "b" (depth 1)   rows 0 1     parent 0
//     row 2: a e E        node  2: "c E"           row 0        parent 1     leaf of row 0
//     all in one group    node  3: "d E"           row 1        parent 1     leaf of row 1
//                         node  4: "e E"           row 2        parent 0     leaf of row 2
//
// Time: one comparison per token of the shared prefixes, plus on the CPU O(G) child look-ups per row, and on
// CUDA one sort of a group's rows for each branching that follows another along a path.
#pragma once
#include "ops/array.hpp"

namespace tokcredit {

struct TreeBuild {
  Rows rows; // the mask is not read: tokens the policy did not choose are part of the state
  Type type; // i32 or i64
  const void *tokens;
  const int64_t *group; // [R], dense: 0 .. groups - 1
  int64_t groups;
  int64_t *leaf;     // [R] node at which the row ends
  int64_t *parent;   // [2R] -1 at a root
  int64_t *group_of; // [2R]
  int64_t *depth;    // [2R] tokens before the node
  int64_t *length;   // [2R] tokens of the node
  int64_t *count;    // [2R] rows through the node
  int64_t *degree;   // [2R] child nodes plus rows that end here
  int64_t *size;     // [] number of nodes
};

// From the leaves to the roots: y[v] = scale[v] * (sum of x over rows ending at v + sum of y over children of
// v). Without scale it is the sum over all rows through v; with 1 / degree it is the mean of means.
struct TreeFold {
  Type type; // f32 or f64, of x, scale and y; sums are kept in double
  const int64_t *leaf;
  const int64_t *parent;
  const void *scale; // [capacity] or null
  const void *x;     // [R]
  void *y;           // [capacity]
  int64_t rows;
  int64_t capacity;
};

// The mean of x over the rows through each node that count; 0 where none does. With `change` the mean of the
// parent's rows is taken away, and a root has 0. The mean of equal numbers is exactly that number. Means and
// changes are kept in double and rounded once.
//
//     x 1 0 1, rows as above, all counted   2/3 1/2 1 0 1   change 0 -1/6 1/2 -1/2 1/3
struct TreeMean {
  Type type; // f32 or f64, of x and y
  const int64_t *leaf;
  const int64_t *parent;
  const bool *counts; // [R], or null for all
  const void *x;      // [R]
  bool change;
  void *y; // [capacity]
  int64_t rows;
  int64_t capacity;
};

// Run-length decoding. For token t of row r inside node v:
//     y[t] = row[r] + body[v] + (t is the first token of v ? head[v] : 0)
// and 0 where masked or padded. Without a tree only row is used. All of one type: f32, f64, i64 or b8 (where
// + is "or").
struct Expand {
  Rows rows;
  Type type;
  const void *row;       // [R] or null
  const int64_t *leaf;   // [R], or null for no tree
  const int64_t *parent; // [capacity]
  const int64_t *depth;  // [capacity]
  const void *body;      // [capacity] or null
  const void *head;      // [capacity] or null
  void *y;               // [N]
  int64_t nodes;         // capacity
};

namespace cpu {
void tree_build(const TreeBuild &, int threads);
void tree_fold(const TreeFold &);
void tree_mean(const TreeMean &);
void expand(const Expand &, int threads);
} // namespace cpu
namespace cuda {
class Queue;
void tree_build(const TreeBuild &, Queue &);
void tree_fold(const TreeFold &, Queue &);
void tree_mean(const TreeMean &, Queue &);
void expand(const Expand &, Queue &);
} // namespace cuda

} // namespace tokcredit
