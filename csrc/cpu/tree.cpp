#include "ops/tree.hpp"
#include "cpu/common_run.hpp"
#include "cpu/expand_rows.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "math/dispatch.hpp"
#include "math/mean.hpp"
#include <vector>

namespace tokcredit::cpu {
namespace {

struct Node {
  int64_t row; // a row through the node; its tokens [depth, depth + length) are the node's
  int64_t depth;
  int64_t length;
  int64_t parent;
  int64_t first_child; // children are a linked list
  int64_t next_sibling;
  int64_t number; // in the final order, -1 until seen
};

template <class Token> struct GroupTree {
  const TreeBuild &build;
  const Token *tokens;
  std::vector<Node> nodes;
  int64_t root = 0;

  const Token *text(int64_t row, int64_t depth) const { return tokens + build.rows.begin[row] + depth; }

  // Cuts node v after `at` of its tokens. The lower part keeps the index (rows may already end there);
  // returns the new upper part.
  int64_t split(int64_t v, int64_t at) {
    const int64_t upper = int64_t(nodes.size());
    nodes.push_back({nodes[v].row, nodes[v].depth, at, nodes[v].parent, v, nodes[v].next_sibling, -1});
    if (nodes[v].parent < 0) {
      root = upper;
    } else {
      int64_t *link = &nodes[nodes[v].parent].first_child;
      while (*link != v)
        link = &nodes[*link].next_sibling;
      *link = upper;
    }
    nodes[v].depth += at;
    nodes[v].length -= at;
    nodes[v].parent = upper;
    nodes[v].next_sibling = -1;
    return upper;
  }

  void insert(int64_t row) {
    const int64_t length = build.rows.end[row] - build.rows.begin[row];
    if (nodes.empty()) {
      nodes.push_back({row, 0, length, -1, -1, -1, -1});
      build.leaf[row] = 0;
      return;
    }
    int64_t v = root;
    for (;;) {
      const int64_t depth = nodes[v].depth;
      const int64_t shared =
          common_run(text(row, depth), text(nodes[v].row, depth), std::min(nodes[v].length, length - depth));
      if (shared < nodes[v].length)
        v = split(v, shared);
      const int64_t at = depth + shared;
      if (at == length) {
        build.leaf[row] = v;
        return;
      }
      int64_t child = nodes[v].first_child;
      while (child >= 0 && *text(nodes[child].row, at) != *text(row, at))
        child = nodes[child].next_sibling;
      if (child < 0) {
        const int64_t leaf = int64_t(nodes.size());
        nodes.push_back({row, at, length - at, v, -1, nodes[v].first_child, -1});
        nodes[v].first_child = leaf;
        build.leaf[row] = leaf;
        return;
      }
      v = child;
    }
  }
};

template <class Token> void build_all(const TreeBuild &b, int threads) {
  const int64_t R = b.rows.count;
  std::vector<int64_t> start(b.groups + 1, 0), order(R);
  for (int64_t r = 0; r < R; ++r)
    ++start[b.group[r] + 1];
  for (int64_t g = 0; g < b.groups; ++g)
    start[g + 1] += start[g];
  {
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t r = 0; r < R; ++r)
      order[next[b.group[r]]++] = r;
  }
  std::vector<GroupTree<Token>> trees(b.groups, {b, static_cast<const Token *>(b.tokens), {}});
  parallel(b.groups, row_grain(b.groups, b.rows.size), threads, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      trees[g].nodes.reserve(2 * (start[g + 1] - start[g]));
      for (int64_t k = start[g]; k < start[g + 1]; ++k)
        trees[g].insert(order[k]);
    }
  });

  int64_t size = 0;
  std::vector<int64_t> path;
  for (int64_t r = 0; r < R; ++r) {
    auto &nodes = trees[b.group[r]].nodes;
    path.clear();
    for (int64_t v = b.leaf[r]; v >= 0 && nodes[v].number < 0; v = nodes[v].parent)
      path.push_back(v);
    for (; !path.empty(); path.pop_back()) {
      Node &node = nodes[path.back()];
      node.number = size;
      b.parent[size] = node.parent < 0 ? -1 : nodes[node.parent].number;
      b.group_of[size] = b.group[r];
      b.depth[size] = node.depth;
      b.length[size] = node.length;
      b.count[size] = 0;
      b.degree[size] = 0;
      ++size;
    }
    b.leaf[r] = nodes[b.leaf[r]].number;
    ++b.count[b.leaf[r]];
    ++b.degree[b.leaf[r]];
  }
  *b.size = size;
  for (int64_t v = size; v-- > 0;)
    if (b.parent[v] >= 0) {
      b.count[b.parent[v]] += b.count[v];
      ++b.degree[b.parent[v]];
    }
  for (int64_t v = size; v < 2 * R; ++v) {
    b.parent[v] = -1;
    b.group_of[v] = b.depth[v] = b.length[v] = b.count[v] = b.degree[v] = 0;
  }
}

template <class T> void mean(const TreeMean &f) {
  const T *x = static_cast<const T *>(f.x);
  T *y = static_cast<T *>(f.y);
  std::vector<Mean> means(f.capacity);
  for (int64_t r = 0; r < f.rows; ++r)
    if (!f.counts || f.counts[r])
      means[f.leaf[r]].add(double(x[r]));
  for (int64_t v = f.capacity; v-- > 0;)
    if (f.parent[v] >= 0)
      means[f.parent[v]].merge(means[v]);
  for (int64_t v = 0; v < f.capacity; ++v) {
    const double own = means[v].value();
    y[v] = T(!f.change ? own : f.parent[v] < 0 ? 0 : own - means[f.parent[v]].value());
  }
}

template <class T> void fold(const TreeFold &f) {
  const T *x = static_cast<const T *>(f.x), *scale = static_cast<const T *>(f.scale);
  T *y = static_cast<T *>(f.y);
  std::vector<double> sum(f.capacity, 0.0);
  for (int64_t r = 0; r < f.rows; ++r)
    sum[f.leaf[r]] += double(x[r]);
  for (int64_t v = f.capacity; v-- > 0;) {
    if (scale)
      sum[v] *= double(scale[v]);
    y[v] = T(sum[v]);
    if (f.parent[v] >= 0)
      sum[f.parent[v]] += sum[v];
  }
}

} // namespace

void tree_build(const TreeBuild &b, int threads) {
  b.type == Type::i32 ? build_all<int32_t>(b, threads) : build_all<int64_t>(b, threads);
}

void tree_fold(const TreeFold &f) { f.type == Type::f64 ? fold<double>(f) : fold<float>(f); }

void tree_mean(const TreeMean &f) { f.type == Type::f64 ? mean<double>(f) : mean<float>(f); }

void expand(const Expand &e, int threads) {
  const auto rows = TOKCREDIT_CHOOSE(expand_rows);
  parallel(e.rows.count, row_grain(e.rows.count, e.rows.size, light), threads,
           [&](int64_t first, int64_t last) { rows(e, first, last); });
}

} // namespace tokcredit::cpu
