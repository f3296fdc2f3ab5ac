// The depth-first order of rows that are texts of two spans, and how much each shares with the one before.
#pragma once
#include "cpu/common_run.hpp"
#include "cpu/parallel.hpp"
#include "ops/tree_pack.hpp"
#include <unordered_map>

namespace tokcredit::cpu {

// A row: its context, then its tokens.
template <class Token> struct Text {
  const Token *context, *tokens;
  const int64_t *context_tags, *tags;
  int64_t split; // tokens of the context

  Token at(int64_t i) const { return i < split ? context[i] : tokens[i - split]; }
  int64_t tag(int64_t i) const { return !tags ? 0 : i < split ? context_tags[i] : tags[i - split]; }
};

// Calls body(i, n) for the runs of [from, to) on which neither text changes its span, until it stops short.
template <class Body> int64_t over_runs(int64_t split, int64_t other, int64_t from, int64_t to, Body body) {
  while (from < to) {
    int64_t last = to;
    if (from < split)
      last = std::min(last, split);
    if (from < other)
      last = std::min(last, other);
    const int64_t same = body(from, last - from);
    from += same;
    if (from < last)
      break;
  }
  return from;
}

// One past the last position of [from, to) up to which both texts are equal.
template <class Token> int64_t common(const Text<Token> &a, const Text<Token> &b, int64_t from, int64_t to) {
  to = over_runs(a.split, b.split, from, to, [&](int64_t i, int64_t n) {
    return common_run(i < a.split ? a.context + i : a.tokens + (i - a.split),
                      i < b.split ? b.context + i : b.tokens + (i - b.split), n);
  });
  if (a.tags)
    to = over_runs(a.split, b.split, from, to, [&](int64_t i, int64_t n) {
      return common_run(i < a.split ? a.context_tags + i : a.tags + (i - a.split),
                        i < b.split ? b.context_tags + i : b.tags + (i - b.split), n);
    });
  return to;
}

template <class Token> class Forest {
public:
  Forest(const std::vector<Text<Token>> &texts, const std::vector<int64_t> &lengths)
      : texts_(texts), lengths_(lengths), leaf_(texts.size(), -1) {
    nodes_.push_back({-1, 0, 0, -1, -1, -1, -1, -1});
  }

  // Adds a row that shares exactly `shared` tokens with an earlier one, or with none (-1) if that is 0.
  void insert(int64_t row, int64_t like, int64_t shared) {
    int64_t v = 0, at = 0;
    if (like >= 0 && shared > 0) {
      v = leaf_[like], at = shared;
      while (nodes_[v].depth >= at)
        v = nodes_[v].parent;
    }
    for (;;) {
      if (at < end(v))
        v = split(v, at);
      if (at == lengths_[row])
        return finish(row, v);
      const Key key{v, int64_t(texts_[row].at(at)), texts_[row].tag(at)};
      const auto found = children_.find(key);
      if (found == children_.end()) {
        const int64_t child = int64_t(nodes_.size());
        nodes_.push_back({row, at, lengths_[row] - at, v, -1, -1, -1, -1});
        append(v, child);
        children_.emplace(key, child);
        return finish(row, child);
      }
      v = found->second;
      at = common(texts_[row], texts_[nodes_[v].row], at, std::min(end(v), lengths_[row]));
    }
  }

  // The rows in depth-first order of their ends, and what each shares with the one before.
  void order(std::vector<int64_t> &rows, std::vector<int64_t> &shared) const {
    std::vector<int64_t> first(nodes_.size(), -1), next(leaf_.size(), -1);
    for (int64_t r = int64_t(leaf_.size()); r-- > 0;)
      if (leaf_[r] >= 0) {
        next[r] = first[leaf_[r]];
        first[leaf_[r]] = r;
      }
    int64_t low = 0, v = 0;
    for (;;) {
      for (int64_t r = first[v]; r >= 0; r = next[r]) {
        rows.push_back(r);
        shared.push_back(low);
        low = end(v);
      }
      if (nodes_[v].first_child >= 0) {
        v = nodes_[v].first_child;
        continue;
      }
      while (v != 0 && nodes_[v].next_sibling < 0) {
        v = nodes_[v].parent;
        low = std::min(low, end(v));
      }
      if (v == 0)
        return;
      low = std::min(low, nodes_[v].depth);
      v = nodes_[v].next_sibling;
    }
  }

private:
  struct Node {
    int64_t row; // through the node
    int64_t depth, length, parent;
    int64_t first_child, last_child, next_sibling, previous_sibling;
  };
  struct Key {
    int64_t node, token, tag;
    bool operator==(const Key &o) const { return node == o.node && token == o.token && tag == o.tag; }
  };
  struct Hash {
    size_t operator()(const Key &key) const {
      uint64_t h = uint64_t(key.node) * 0x9e3779b97f4a7c15u;
      h = (h ^ (h >> 32) ^ uint64_t(key.token)) * 0xd6e8feb86659fd93u;
      h = (h ^ (h >> 32) ^ uint64_t(key.tag)) * 0xd6e8feb86659fd93u;
      return size_t(h ^ (h >> 32));
    }
  };

  int64_t end(int64_t v) const { return nodes_[v].depth + nodes_[v].length; }

  void finish(int64_t row, int64_t v) { leaf_[row] = v; }

  void append(int64_t v, int64_t child) {
    const int64_t last = nodes_[v].last_child;
    nodes_[child].previous_sibling = last;
    (last < 0 ? nodes_[v].first_child : nodes_[last].next_sibling) = child;
    nodes_[v].last_child = child;
  }

  // Cuts node v so that a node ends at `at`, and returns that one. The lower part keeps its number, because
  // rows may already end there and its children are known by it.
  int64_t split(int64_t v, int64_t at) {
    const int64_t upper = int64_t(nodes_.size());
    const Node old = nodes_[v];
    const Text<Token> &text = texts_[old.row];
    nodes_.push_back(
        {old.row, old.depth, at - old.depth, old.parent, v, v, old.next_sibling, old.previous_sibling});
    Node &parent = nodes_[old.parent];
    (old.previous_sibling < 0 ? parent.first_child : nodes_[old.previous_sibling].next_sibling) = upper;
    (old.next_sibling < 0 ? parent.last_child : nodes_[old.next_sibling].previous_sibling) = upper;
    children_[{old.parent, int64_t(text.at(old.depth)), text.tag(old.depth)}] = upper;
    children_[{upper, int64_t(text.at(at)), text.tag(at)}] = v;
    Node &lower = nodes_[v];
    lower.depth = at;
    lower.length = old.depth + old.length - at;
    lower.parent = upper;
    lower.next_sibling = lower.previous_sibling = -1;
    return upper;
  }

  const std::vector<Text<Token>> &texts_;
  const std::vector<int64_t> &lengths_;
  std::vector<int64_t> leaf_;
  std::vector<Node> nodes_; // the first is the root, which holds no token
  std::unordered_map<Key, int64_t, Hash> children_;
};

} // namespace tokcredit::cpu
