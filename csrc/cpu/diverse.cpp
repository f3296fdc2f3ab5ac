// Candidates wait in a heap by their last known worth. The one on top is compared with the tokens chosen
// since then, until it falls below the next one or is up to date.
#include "ops/diverse.hpp"
#include "cpu/diverse_rows.hpp"
#include "cpu/parallel.hpp"
#include "math/diverse.hpp"
#include <queue>
#include <vector>

namespace tokcredit::cpu {
namespace {

void choose_row(const Diverse &d, int64_t r) {
  const int64_t begin = d.rows.begin[r], length = d.rows.end[r] - begin;
  const int64_t wanted = std::min(d.number[r], d.steps);
  if (wanted <= 0)
    return;
  const auto product = TOKCREDIT_CHOOSE(inner_product);
  std::vector<float> inverse(length), score(length), nearest(length, no_cosine);
  std::vector<int64_t> seen(length, 0), chosen;
  std::vector<uint64_t> start;
  uint64_t first = 0;
  for (int64_t i = 0; i < length; ++i) {
    if (d.rows.mask && !d.rows.mask[begin + i])
      continue;
    const float square = product(d.type, d.x, d.width, begin + i, begin + i);
    inverse[i] = inverse_norm(square);
    score[i] = checked_score(d.score[begin + i], square);
    first = std::max(first, candidate(score[i], begin + i));
    start.push_back(candidate(worth(d, score[i], no_cosine), begin + i));
  }
  const auto choose = [&](int64_t t) {
    d.order[t] = int64_t(chosen.size());
    chosen.push_back(t);
  };
  if (start.empty())
    return;
  choose(token_of(first));
  std::priority_queue<uint64_t> waiting(std::less<uint64_t>(), std::move(start));
  while (int64_t(chosen.size()) < wanted && !waiting.empty()) {
    const int64_t t = token_of(waiting.top()), i = t - begin;
    uint64_t own = waiting.top();
    waiting.pop();
    if (d.order[t] >= 0)
      continue;
    const uint64_t next = waiting.empty() ? 0 : waiting.top();
    while (own >= next && seen[i] < int64_t(chosen.size())) {
      const int64_t other = chosen[seen[i]++];
      const float cosine = product(d.type, d.x, d.width, t, other) * inverse[i] * inverse[other - begin];
      nearest[i] = cosine > nearest[i] ? cosine : nearest[i];
      own = candidate(worth(d, score[i], nearest[i]), t);
    }
    own >= next ? choose(t) : waiting.push(own);
  }
}

} // namespace

void diverse(const Diverse &d, int threads) {
  std::fill(d.order, d.order + d.rows.size, -1);
  const int64_t grain = row_grain(d.rows.count, d.rows.size, std::max<int64_t>(1, light / (1 + d.width)));
  parallel(d.rows.count, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      choose_row(d, r);
  });
}

} // namespace tokcredit::cpu
