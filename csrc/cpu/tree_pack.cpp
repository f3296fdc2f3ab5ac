#include "ops/tree_pack.hpp"
#include "cpu/bins.hpp"
#include "cpu/forest.hpp"
#include "ops/memory.hpp"
#include <limits>
#include <memory>
#include <numeric>

namespace tokcredit::cpu {
namespace {

// Places and predictions are numbered in 32 bits.
constexpr int64_t most_places = std::numeric_limits<int32_t>::max();

// The smallest of x[a + 1 .. b].
class RangeMinimum {
public:
  explicit RangeMinimum(const std::vector<int64_t> &x) : levels_{x} {
    for (size_t step = 1; 2 * step <= x.size(); step *= 2) {
      const auto &last = levels_.back();
      std::vector<int64_t> next(x.size() - 2 * step + 1);
      for (size_t i = 0; i < next.size(); ++i)
        next[i] = std::min(last[i], last[i + step]);
      levels_.push_back(std::move(next));
    }
  }
  int64_t operator()(int64_t a, int64_t b) const {
    int level = 0;
    while ((int64_t(2) << level) <= b - a)
      ++level;
    return std::min(levels_[level][a + 1], levels_[level][b + 1 - (int64_t(1) << level)]);
  }

private:
  std::vector<std::vector<int64_t>> levels_;
};

// Memory that earlier calls have left, because memory that is new to the process is slow.
template <class X> class Scratch {
public:
  explicit Scratch(int64_t size = 1) : memory_(take(std::max<int64_t>(size, 1) * int64_t(sizeof(X)))) {}
  Scratch(const Scratch &) = delete;
  ~Scratch() { give_back(memory_); }
  X *get() const { return static_cast<X *>(memory_.data); }

private:
  Memory memory_;
};

int64_t count_true(const bool *x, int64_t n) {
  int64_t count = 0, i = 0;
  for (uint64_t eight; i + 8 <= n; i += 8) {
    std::memcpy(&eight, x + i, 8);
    count += int64_t(eight * 0x0101010101010101u >> 56); // the sum of its bytes
  }
  for (; i < n; ++i)
    count += x[i];
  return count;
}

// A run of tokens of a row's path: those from this depth on are new in row `from_row` of the bin order.
struct Piece {
  int64_t owner, depth;
};

} // namespace

class TreePlan {
public:
  virtual ~TreePlan() = default;
  virtual void write(const TreePackArrays &, int threads) const = 0;
};

namespace {

template <class Token> class Plan final : public TreePlan {
public:
  Plan(const TreePack &pack, TreePackSizes &sizes, int threads)
      : pack_(pack), rows_(pack_.rows), length_(rows_.count, 0), wants_(rows_.count, 0),
        bin_(rows_.count, -1) {
    sizes = {};
    read_rows(threads);
    for (int64_t r = 0; r < rows_.count; ++r)
      if (length_[r] > 0 && texts_[r].split == 0 && rows_.mask[rows_.begin[r]]) {
        refuse(sizes, TreePackError::predecessor, r, 0);
        return;
      }
    sort_rows(threads);
    if (!cut(sizes))
      return;
    sort_bins();
    number_places(threads);
    find_segments();
    if (new_.back() > most_places) {
      refuse(sizes, TreePackError::size, order_[0], new_.back());
      return;
    }
    sizes.places = places_.back();
    sizes.predictions = predicted_.back();
    sizes.segments = int64_t(segments_.size());
    sizes.bins = bins_;
    sizes.packed = packed();
  }

  void write(const TreePackArrays &a, int threads) const override {
    const Scratch<int32_t> number(new_.back());
    parallel(packed(), row_grain(packed(), new_.back(), light), threads, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k)
        write_new(a, number.get(), k);
    });
    std::vector<int64_t> place_of(rows_.count, -1);
    for (int64_t k = 0; k < packed(); ++k)
      place_of[order_[k]] = k;
    parallel(rows_.count, row_grain(rows_.count, rows_.size, light), threads,
             [&](int64_t first, int64_t last) {
               for (int64_t r = first; r < last; ++r)
                 write_index(a, number.get(), r, place_of[r]);
             });
    for (int64_t i = rows_.count ? rows_.end[rows_.count - 1] : 0; i < rows_.size; ++i)
      a.index[i] = -1;
    for (size_t s = 0; s < segments_.size(); ++s) {
      const Segment &segment = segments_[s];
      a.segment_begin[s] = segment.begin;
      a.segment_parent[s] = segment.parent;
      a.segment_end[s] = segment.end;
      a.segment_depth[s] = segment.depth;
    }
    a.segment_begin[segments_.size()] = places_.back();
    std::copy(order_.begin(), order_.end(), a.row_order);
    std::copy(shared_.begin(), shared_.end(), a.row_shared);
    std::copy(bin_.begin(), bin_.end(), a.row_bin);
    std::copy(length_.begin(), length_.end(), a.row_length);
    for (int64_t b = 0; b <= bins_; ++b) {
      const int64_t k = bin_rows_[b];
      a.bin_rows[b] = k;
      a.bin_places[b] = places_[k];
      a.bin_predictions[b] = predicted_[k];
    }
  }

private:
  struct Segment {
    int64_t begin, parent, depth, end;
  };

  int64_t packed() const { return int64_t(order_.size()); }

  static void refuse(TreePackSizes &sizes, TreePackError error, int64_t row, int64_t needed) {
    sizes.error = error;
    sizes.row = row;
    sizes.needed = needed;
  }

  // Texts, lengths up to the last wanted token, and numbers of wanted tokens.
  void read_rows(int threads) {
    const Token *tokens = static_cast<const Token *>(pack_.tokens);
    const Token *contexts = static_cast<const Token *>(pack_.contexts);
    texts_.resize(rows_.count);
    parallel(rows_.count, row_grain(rows_.count, rows_.size, light), threads,
             [&](int64_t first, int64_t last) {
               for (int64_t r = first; r < last; ++r) {
                 const int64_t context = pack_.context_begin[r], begin = rows_.begin[r];
                 texts_[r] = {contexts + context, tokens + begin,
                              pack_.tags ? pack_.context_tags + context : nullptr,
                              pack_.tags ? pack_.tags + begin : nullptr, pack_.context_end[r] - context};
                 const bool *wanted = rows_.mask + begin;
                 int64_t n = rows_.end[r] - begin;
                 while (n > 0 && !wanted[n - 1])
                   --n;
                 wants_[r] = count_true(wanted, n);
                 length_[r] = n > 0 ? texts_[r].split + n : 0;
               }
             });
  }

  void sort_rows(int threads) {
    // Each row is compared with one before it, in parallel; the tree then needs few comparisons.
    std::vector<int64_t> like(rows_.count, -1), same(rows_.count, 0), last(pack_.groups, -1);
    int64_t other_group = -1, total = 0;
    for (int64_t r = 0; r < rows_.count; ++r) {
      if (length_[r] == 0)
        continue;
      int64_t &before = last[pack_.group[r]];
      like[r] = before >= 0 ? before : other_group;
      if (before < 0)
        other_group = r;
      before = r;
      total += length_[r];
    }
    parallel(rows_.count, row_grain(rows_.count, total), threads, [&](int64_t first, int64_t end) {
      for (int64_t r = first; r < end; ++r)
        if (like[r] >= 0)
          same[r] = common(texts_[r], texts_[like[r]], 0, std::min(length_[r], length_[like[r]]));
    });
    Forest<Token> forest(texts_, length_);
    for (int64_t r = 0; r < rows_.count; ++r)
      if (length_[r] > 0)
        forest.insert(r, like[r], same[r]);
    forest.order(order_, shared_);
  }

  // Whether no row extends row k: its last token is a leaf's. Row k has shared(k) tokens in common with the
  // row before.
  template <class Common> std::vector<bool> leaves(const std::vector<int64_t> &rows, Common shared) const {
    std::vector<bool> leaf(rows.size(), true);
    for (int64_t k = int64_t(rows.size()) - 1; k-- > 0;)
      if (shared(k + 1) == length_[rows[k]])
        leaf[k] = length_[rows[k + 1]] == length_[rows[k]] && leaf[k + 1];
    return leaf;
  }

  // Wanted tokens that both rows want, among their first `shared` tokens.
  int64_t wanted_by_both(int64_t a, int64_t b, int64_t shared) const {
    int64_t count = 0;
    for (int64_t d = std::max(texts_[a].split, texts_[b].split); d < shared; ++d)
      count += rows_.mask[rows_.begin[a] + d - texts_[a].split] &&
               rows_.mask[rows_.begin[b] + d - texts_[b].split];
    return count;
  }

  // Numbers the bins of the rows. Units are rows in depth-first order, or all rows with one id.
  bool cut(TreePackSizes &sizes) {
    const bool together = pack_.together != nullptr;
    std::vector<std::vector<int64_t>> units;
    std::unordered_map<int64_t, int64_t> unit_of;
    for (int64_t k = 0; k < packed(); ++k) {
      const auto found = together
                             ? unit_of.emplace(pack_.together[order_[k]], int64_t(units.size())).first->second
                             : int64_t(units.size());
      if (found == int64_t(units.size()))
        units.emplace_back();
      units[found].push_back(k);
    }
    const RangeMinimum minimum(together ? shared_ : std::vector<int64_t>{});
    const auto in_common = [&](int64_t a, int64_t b) {
      return b == a + 1 ? shared_[b] : minimum(std::min(a, b), std::max(a, b));
    };
    const std::vector<bool> leaf = leaves(order_, [&](int64_t k) { return shared_[k]; });
    Measure places, predictions;
    places.most = pack_.budget;
    predictions.most = pack_.predictions;
    const bool counts = pack_.predictions < rows_.size;
    int64_t before = -1, places_before = 0;
    for (const auto &unit : units) {
      int64_t own = 0, own_wanted = 0, first = 0, first_wanted = 0;
      for (const int64_t k : unit) {
        const int64_t r = order_[k], all = length_[r] - leaf[k];
        int64_t shared = 0, wanted = 0;
        if (before >= 0) {
          const int64_t both = in_common(before, k);
          shared = std::min({both, all, places_before});
          wanted = counts ? wanted_by_both(r, order_[before], both) : 0;
        }
        if (k == unit.front())
          first = shared, first_wanted = wanted;
        own += all - shared;
        own_wanted += counts ? wants_[r] - wanted : 0;
        before = k, places_before = all;
      }
      places.add(own, first);
      predictions.add(own_wanted, first_wanted);
      const int64_t u = int64_t(places.shared.size()) - 1;
      if (const int64_t alone = places_alone(unit, in_common); alone > pack_.budget)
        return refuse(sizes, TreePackError::budget, order_[unit.front()], alone), false;
      if (const int64_t alone = predictions.size(u, u + 1); alone > pack_.predictions)
        return refuse(sizes, TreePackError::predictions, order_[unit.front()], alone), false;
    }
    if (units.empty())
      return true;
    const Bins bins(places, predictions);
    std::vector<int64_t> cuts = bins.shortest(pack_.bin_cost);
    const int64_t count = int64_t(cuts.size()) - 1;
    if (pack_.ranks > 1)
      cuts = bins.balanced((count + pack_.ranks - 1) / pack_.ranks * pack_.ranks);
    bins_ = int64_t(cuts.size()) - 1;
    for (int64_t b = 0; b < bins_; ++b)
      for (int64_t u = cuts[b]; u < cuts[b + 1]; ++u)
        for (const int64_t k : units[u])
          bin_[order_[k]] = int32_t(b);
    return true;
  }

  template <class Common> int64_t places_alone(const std::vector<int64_t> &unit, Common in_common) const {
    std::vector<int64_t> rows, shared{0};
    for (size_t i = 0; i < unit.size(); ++i) {
      rows.push_back(order_[unit[i]]);
      if (i)
        shared.push_back(in_common(unit[i - 1], unit[i]));
    }
    const std::vector<bool> leaf = leaves(rows, [&](int64_t k) { return shared[k]; });
    int64_t sum = 0;
    for (size_t i = 0; i < rows.size(); ++i)
      if (length_[rows[i]] > shared[i])
        sum += length_[rows[i]] - shared[i] - leaf[i];
    return sum;
  }

  // Puts the rows of a bin next to each other.
  void sort_bins() {
    bin_rows_.assign(bins_ + 1, 0);
    for (const int64_t r : order_)
      ++bin_rows_[bin_[r] + 1];
    std::partial_sum(bin_rows_.begin(), bin_rows_.end(), bin_rows_.begin());
    std::vector<int64_t> at(bin_rows_.begin(), bin_rows_.end()), last(bins_, -1);
    std::vector<int64_t> order(order_.size()), shared(order_.size());
    const RangeMinimum minimum(pack_.together ? shared_ : std::vector<int64_t>{});
    for (int64_t k = 0; k < packed(); ++k) {
      const int64_t b = bin_[order_[k]], to = at[b]++;
      order[to] = order_[k];
      shared[to] = last[b] < 0 ? 0 : last[b] + 1 == k ? shared_[k] : minimum(last[b], k);
      last[b] = k;
    }
    order_ = std::move(order);
    shared_ = std::move(shared);
  }

  int64_t place(const Piece &piece, int64_t depth) const {
    return places_[piece.owner] + depth - shared_[piece.owner];
  }

  // Where the new tokens and places of each row begin, the pieces of its path, and its wanted new tokens.
  void number_places(int threads) {
    const std::vector<bool> leaf = leaves(order_, [&](int64_t k) { return shared_[k]; });
    places_.assign(1, 0);
    new_.assign(1, 0);
    pieces_from_.assign(1, 0);
    above_.assign(packed(), -1);
    std::vector<Piece> path;
    for (int64_t k = 0; k < packed(); ++k) {
      const int64_t fresh = length_[order_[k]] - shared_[k];
      while (!path.empty() && fresh > 0 && path.back().depth >= shared_[k])
        path.pop_back();
      if (fresh > 0) {
        if (!path.empty())
          above_[k] = place(path.back(), shared_[k] - 1);
        path.push_back({k, shared_[k]});
      }
      pieces_.insert(pieces_.end(), path.begin(), path.end());
      pieces_from_.push_back(int64_t(pieces_.size()));
      new_.push_back(new_.back() + fresh);
      places_.push_back(places_.back() + (fresh > 0 ? fresh - leaf[k] : 0));
    }
    wanted_ = std::make_unique<Scratch<bool>>(new_.back());
    parallel(packed(), row_grain(packed(), new_.back(), light), threads, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        const int64_t r = order_[k], split = texts_[r].split, from = std::max(shared_[k], split);
        bool *to = wanted_->get() + new_[k];
        std::fill(to, to + (std::min(from, length_[r]) - shared_[k]), false);
        if (length_[r] > from)
          std::copy(rows_.mask + rows_.begin[r] + from - split,
                    rows_.mask + rows_.begin[r] + length_[r] - split, to + from - shared_[k]);
      }
    });
    for (int64_t k = 0; k < packed(); ++k)
      over_pieces(k, shared_[k], [&](const Piece &piece, int64_t from, int64_t to) {
        const bool *mask = rows_.mask + rows_.begin[order_[k]] - texts_[order_[k]].split;
        bool *wanted = wanted_->get() + new_[piece.owner] - shared_[piece.owner];
        for (int64_t d = from; d < to; ++d)
          wanted[d] = wanted[d] | mask[d];
      });
    predicted_.assign(1, 0);
    for (int64_t k = 0; k < packed(); ++k)
      predicted_.push_back(predicted_.back() + count_true(wanted_->get() + new_[k], new_[k + 1] - new_[k]));
  }

  // Calls body(piece, from, to) for the depths of row k's own tokens below `end`, piece by piece.
  template <class Body> void over_pieces(int64_t k, int64_t end, Body body) const {
    const int64_t split = texts_[order_[k]].split;
    for (int64_t p = pieces_from_[k]; p < pieces_from_[k + 1]; ++p) {
      const int64_t last = p + 1 < pieces_from_[k + 1] ? std::min(end, pieces_[p + 1].depth) : end;
      if (const int64_t from = std::max(split, pieces_[p].depth); from < last)
        body(pieces_[p], from, last);
    }
  }

  void find_segments() {
    for (int64_t k = 0; k < packed(); ++k) {
      const int64_t begin = places_[k], above = above_[k];
      if (places_[k + 1] == begin || (above >= 0 && begin == above + 1))
        continue;
      segments_.push_back({begin, above, shared_[k], 0});
      if (above >= 0)
        segments_.push_back({above + 1, above, shared_[k], 0});
    }
    const auto earlier = [](const Segment &a, const Segment &b) { return a.begin < b.begin; };
    const auto equal = [](const Segment &a, const Segment &b) { return a.begin == b.begin; };
    std::sort(segments_.begin(), segments_.end(), earlier);
    segments_.erase(std::unique(segments_.begin(), segments_.end(), equal), segments_.end());
    std::vector<int64_t> open;
    for (size_t s = 0; s < segments_.size(); ++s) {
      // A parent is the last place of its segment.
      while (!open.empty() && segments_[open.back() + 1].begin - 1 != segments_[s].parent) {
        segments_[open.back()].end = segments_[s].begin;
        open.pop_back();
      }
      open.push_back(int64_t(s));
    }
    for (const int64_t s : open)
      segments_[s].end = places_.back();
  }

  void write_new(const TreePackArrays &a, int32_t *number, int64_t k) const {
    const int64_t r = order_[k];
    const Text<Token> &text = texts_[r];
    Token *tokens = static_cast<Token *>(a.tokens) + places_[k];
    const int64_t first = shared_[k], last = first + places_[k + 1] - places_[k];
    over_runs(text.split, 0, first, last, [&](int64_t d, int64_t n) {
      const Token *from = d < text.split ? text.context + d : text.tokens + (d - text.split);
      std::copy(from, from + n, tokens + (d - first));
      return n;
    });
    const bool *wanted = wanted_->get() + new_[k];
    int32_t *numbers = number + new_[k];
    int64_t q = predicted_[k];
    const int64_t fresh = length_[r] - first, before = places_[k] - 1;
    if (fresh > 0 && predicted_[k + 1] - q == fresh) { // the usual case, which is fast
      for (int64_t i = 0; i < fresh; ++i)
        numbers[i] = int32_t(q + i);
      for (int64_t i = 0; i < fresh; ++i)
        a.source[q + i] = int32_t(before + i);
      a.source[q] = int32_t(above_[k]);
      over_runs(text.split, 0, first, length_[r], [&](int64_t d, int64_t n) {
        const Token *from = d < text.split ? text.context + d : text.tokens + (d - text.split);
        std::copy(from, from + n, a.target + q + (d - first));
        return n;
      });
      return;
    }
    for (int64_t i = 0; i < fresh; ++i) {
      if (!wanted[i])
        continue;
      numbers[i] = int32_t(q);
      a.source[q] = int32_t(i == 0 ? above_[k] : before + i);
      a.target[q] = int64_t(text.at(first + i));
      ++q;
    }
  }

  void write_index(const TreePackArrays &a, const int32_t *number, int64_t r, int64_t k) const {
    const int64_t before = r ? rows_.end[r - 1] : 0, begin = rows_.begin[r];
    const int64_t own = k < 0 ? 0 : length_[r] - texts_[r].split;
    std::fill(a.index + before, a.index + begin, -1);
    std::fill(a.index + begin + own, a.index + rows_.end[r], -1);
    if (k < 0)
      return;
    const int64_t shift = begin - texts_[r].split;
    over_pieces(k, length_[r], [&](const Piece &piece, int64_t from, int64_t to) {
      const int32_t *numbers = number + new_[piece.owner] - shared_[piece.owner];
      for (int64_t d = from; d < to; ++d)
        a.index[shift + d] = rows_.mask[shift + d] ? numbers[d] : -1;
    });
  }

  const TreePack pack_;
  const Rows &rows_;
  std::vector<Text<Token>> texts_;
  std::vector<int64_t> length_; // of the full row, 0 where it is left out
  std::vector<int64_t> wants_;
  std::vector<int32_t> bin_;
  int64_t bins_ = 0;
  std::vector<int64_t> order_, shared_; // the rows, and what each has in common with the one before
  std::vector<int64_t> bin_rows_;
  std::vector<int64_t> new_, places_, predicted_; // of each row's new tokens, the first
  std::vector<int64_t> above_;                    // the place before a row's new tokens, or -1
  std::vector<Piece> pieces_;
  std::vector<int64_t> pieces_from_;
  std::unique_ptr<Scratch<bool>> wanted_; // of each new token, by any row
  std::vector<Segment> segments_;
};

} // namespace

TreePlan *tree_plan(const TreePack &pack, TreePackSizes &sizes, int threads) {
  if (pack.type == Type::i32)
    return new Plan<int32_t>(pack, sizes, threads);
  return new Plan<int64_t>(pack, sizes, threads);
}

void tree_write(const TreePlan &plan, const TreePackArrays &arrays, int threads) {
  plan.write(arrays, threads);
}

void tree_free(TreePlan *plan) { delete plan; }

} // namespace tokcredit::cpu
