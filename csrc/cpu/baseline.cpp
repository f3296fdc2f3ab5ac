#include "ops/baseline.hpp"
#include "cpu/baseline_rows.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "math/dispatch.hpp"
#include <numeric>
#include <vector>

namespace tokcredit::cpu {

void baseline(const Baseline &b, int threads) {
  const int64_t R = b.rows.count;
  std::vector<int64_t> starts(b.groups + 1, 0), members(R);
  for (int64_t r = 0; r < R; ++r)
    ++starts[b.group[r] + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t r = 0; r < R; ++r)
    members[next[b.group[r]]++] = r;
  const auto group = TOKCREDIT_CHOOSE(baseline_group);
  parallel(b.groups, row_grain(b.groups, b.rows.size), threads, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t *rows = members.data() + starts[g], count = starts[g + 1] - starts[g];
      std::vector<Course> courses(count);
      std::vector<std::vector<double>> to_go(b.per_row ? 0 : count);
      for (int64_t m = 0; m < int64_t(to_go.size()); ++m) {
        to_go[m].resize((b.rows.end[rows[m]] - b.rows.begin[rows[m]]) / stretch + 2);
        courses[m].to_go = to_go[m].data();
      }
      group(b, rows, count, courses.data());
    }
  });
  with_float(b.type, [&](auto t) {
    using A = accumulate_t<typename decltype(t)::type>;
    parallel(R, row_grain(R, b.rows.size), threads, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        for (void *y : {b.advantages, b.returns})
          if (y)
            clear_padding(b.rows, r, static_cast<A *>(y));
    });
  });
}

} // namespace tokcredit::cpu
