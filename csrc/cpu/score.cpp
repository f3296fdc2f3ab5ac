#include "ops/score.hpp"
#include "cpu/parallel.hpp"
#include "cpu/score_rows.hpp"

namespace tokcredit::cpu {

void deviation(const Deviation &d, int threads) {
  parallel(d.size, light, threads,
           [&](int64_t first, int64_t last) { TOKCREDIT_CHOOSE(deviation_tokens)(d, first, last); });
}

void score_bounds(const ScoreBounds &s, int threads) {
  parallel(s.size, tokens_per_chunk, threads,
           [&](int64_t first, int64_t last) { TOKCREDIT_CHOOSE(bounds_tokens)(s, first, last); });
}

void score_factor(const ScoreFactor &s, int threads) {
  parallel(s.size, tokens_per_chunk, threads,
           [&](int64_t first, int64_t last) { TOKCREDIT_CHOOSE(factor_tokens)(s, first, last); });
}

} // namespace tokcredit::cpu
