#include "ops/logits.hpp"
#include "cpu/logits_rows.hpp"
#include "cpu/parallel.hpp"
#include <stdexcept>
#include <string>

namespace tokcredit::cpu {
namespace {

void check_tokens(const Logits &in) {
  for (int64_t i = 0; i < in.rows; ++i) {
    const int64_t token = in.token_type == Type::i64 ? static_cast<const int64_t *>(in.tokens)[i]
                                                     : static_cast<const int32_t *>(in.tokens)[i];
    if (token < -1 || token >= in.vocabulary)
      throw std::invalid_argument("logits: tokens: expected -1 or an id below the vocabulary of " +
                                  std::to_string(in.vocabulary) + ", got " + std::to_string(token) + " at " +
                                  std::to_string(i));
  }
}

// Chunks of about 64k logits.
int64_t grain(const Logits &in) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(in.vocabulary, 1)); }

} // namespace

void logits(const LogitsForward &f, int threads) {
  check_tokens(f.in);
  const auto rows = TOKCREDIT_CHOOSE(logits_rows);
  parallel(f.in.rows, grain(f.in), threads, [&](int64_t first, int64_t last) { rows(f, first, last); });
}

void logits_gradient(const LogitsBackward &b, int threads) {
  check_tokens(b.in);
  const auto rows = TOKCREDIT_CHOOSE(logits_gradient_rows);
  parallel(b.in.rows, grain(b.in), threads, [&](int64_t first, int64_t last) { rows(b, first, last); });
}

} // namespace tokcredit::cpu
