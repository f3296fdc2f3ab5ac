// Cuts a sequence of units into bins. Units j .. i - 1 in one bin have size
//     sum of own[j .. i - 1] + shared[j]
// in each of two measures, places and predictions; both grow with the range. A unit alone always fits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

namespace tokcredit::cpu {

struct Measure {
  std::vector<int64_t> prefix{0}, shared;
  int64_t most;

  void add(int64_t own, int64_t in_common) {
    prefix.push_back(prefix.back() + own);
    shared.push_back(in_common);
  }
  int64_t size(int64_t j, int64_t i) const { return prefix[i] - prefix[j] + shared[j]; }
};

class Bins {
public:
  Bins(const Measure &places, const Measure &predictions)
      : places_(places), predictions_(predictions), count_(int64_t(places.shared.size())) {}

  // The first unit of each bin, and the number of units: fewest places plus `bin_cost` per bin. Of equal ones
  // the later bin is the longer one.
  std::vector<int64_t> shortest(int64_t bin_cost) const {
    std::vector<int64_t> total(count_ + 1, 0), from(count_ + 1, 0);
    std::deque<int64_t> best; // candidates in the window, their costs ascending
    const auto cost = [&](int64_t j) { return total[j] + places_.shared[j] + bin_cost; };
    int64_t low = 0;
    for (int64_t i = 1; i <= count_; ++i) {
      while (!best.empty() && cost(best.back()) > cost(i - 1))
        best.pop_back();
      best.push_back(i - 1);
      while (low < i - 1 && !fits(low, i, places_.most))
        ++low;
      while (best.front() < low)
        best.pop_front();
      from[i] = best.front();
      total[i] = cost(from[i]);
    }
    std::vector<int64_t> cuts{count_};
    while (cuts.back() > 0)
      cuts.push_back(from[cuts.back()]);
    std::reverse(cuts.begin(), cuts.end());
    return cuts;
  }

  // `bins` bins, or as many as there are units, of which the largest is smallest.
  std::vector<int64_t> balanced(int64_t bins) const {
    bins = std::min(bins, count_);
    int64_t low = 0, high = places_.most;
    high = std::min(high, places_.size(0, count_));
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (int64_t(filled(middle).size()) - 1 <= bins)
        high = middle;
      else
        low = middle + 1;
    }
    std::vector<int64_t> cuts = filled(low);
    while (int64_t(cuts.size()) - 1 < bins)
      halve_largest(cuts);
    return cuts;
  }

private:
  bool fits(int64_t j, int64_t i, int64_t most) const {
    return places_.size(j, i) <= most && predictions_.size(j, i) <= predictions_.most;
  }

  std::vector<int64_t> filled(int64_t most) const {
    std::vector<int64_t> cuts{0};
    for (int64_t i = 1; i < count_; ++i)
      if (!fits(cuts.back(), i + 1, most))
        cuts.push_back(i);
    cuts.push_back(count_);
    return cuts;
  }

  void halve_largest(std::vector<int64_t> &cuts) const {
    int64_t largest = -1;
    for (int64_t b = 0; b + 1 < int64_t(cuts.size()); ++b)
      if (cuts[b + 1] - cuts[b] > 1 && (largest < 0 || places_.size(cuts[b], cuts[b + 1]) >
                                                           places_.size(cuts[largest], cuts[largest + 1])))
        largest = b;
    const int64_t first = cuts[largest], last = cuts[largest + 1];
    const auto worse = [&](int64_t at) { return std::max(places_.size(first, at), places_.size(at, last)); };
    int64_t best = first + 1;
    for (int64_t at = first + 2; at < last; ++at)
      if (worse(at) < worse(best))
        best = at;
    cuts.insert(cuts.begin() + largest + 1, best);
  }

  const Measure &places_, &predictions_;
  int64_t count_;
};

} // namespace tokcredit::cpu
