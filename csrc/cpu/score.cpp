#include "ops/score.hpp"
#include "cpu/parallel.hpp"
#include "cpu/score_rows.hpp"
#include "math/score.hpp"
#include "ops/segment.hpp"
#include "ops/select.hpp"
#include <vector>

namespace tokcredit::cpu {

namespace {

// Distances in the place of logarithms.
template <class A> void deviate(const LogDeviation &d, Type type, int threads) {
  const int64_t rows = d.rows.count;
  std::vector<double> table(size_t(rows * width_of(Reduction::moments)));
  segment_rows({d.rows, type, d.y, Reduction::moments, 0, table.data()}, threads);
  const auto moments = merged(table.data(), 0, rows);
  const int64_t rank = nearest_rank(d.quantile, moments.count);
  A quantile;
  kth({d.rows, type, d.y, nullptr, {&rank}, 1}, &quantile, threads);
  parallel(d.rows.size, light, threads, [&](int64_t first, int64_t last) {
    TOKCREDIT_CHOOSE(distance_tokens)(d, moments, &quantile, first, last);
  });
  Distance<A>(d, moments, quantile).write(d.statistics);
}

} // namespace

void log_deviation(const LogDeviation &d, int threads) {
  parallel(d.rows.size, tokens_per_chunk, threads,
           [&](int64_t first, int64_t last) { TOKCREDIT_CHOOSE(log_tokens)(d, first, last); });
  d.type == Type::f64 ? deviate<double>(d, Type::f64, threads) : deviate<float>(d, Type::f32, threads);
}

void score_bounds(const ScoreBounds &s, int threads) {
  parallel(s.size, tokens_per_chunk, threads,
           [&](int64_t first, int64_t last) { TOKCREDIT_CHOOSE(bounds_tokens)(s, first, last); });
}

void score_factor(const ScoreFactor &s, int threads) {
  parallel(s.rows.count, row_grain(s.rows.count, s.rows.size), threads,
           [&](int64_t first, int64_t last) { TOKCREDIT_CHOOSE(factor_rows)(s, first, last); });
}

} // namespace tokcredit::cpu
