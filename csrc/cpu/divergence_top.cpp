#include "math/divergence_top.hpp"
#include "cpu/divergence_top_rows.hpp"
#include "cpu/parallel.hpp"
#include <stdexcept>
#include <string>

namespace tokcredit::cpu {
namespace {

void check_ids(const TopRows &in) {
  for (int64_t place = 0; place < in.rows * in.top; ++place) {
    const int64_t id = id_at(in, place);
    if (id < -1 || id >= in.vocabulary)
      throw std::invalid_argument("divergence: ids: expected -1 or an id below the vocabulary of " +
                                  std::to_string(in.vocabulary) + ", got " + std::to_string(id) + " in row " +
                                  std::to_string(place / in.top));
  }
}

// Chunks of about 64k logits.
int64_t grain(const TopRows &in) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(in.vocabulary, 1)); }

} // namespace

void divergence_top(const DivergenceTopForward &f, int threads) {
  check_ids(f.in);
  const auto rows = TOKCREDIT_CHOOSE(divergence_top_rows);
  parallel(f.in.rows, grain(f.in), threads, [&](int64_t first, int64_t last) { rows(f, first, last); });
}

void divergence_top_gradient(const DivergenceTopBackward &b, int threads) {
  check_ids(b.in);
  const auto rows = TOKCREDIT_CHOOSE(divergence_top_gradient_rows);
  parallel(b.in.rows, grain(b.in), threads, [&](int64_t first, int64_t last) { rows(b, first, last); });
}

} // namespace tokcredit::cpu
