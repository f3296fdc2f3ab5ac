#include "ops/logits.hpp"
#include "cpu/logits_rows.hpp"
#include "cpu/parallel.hpp"
#include "math/logit.hpp"
#include <stdexcept>
#include <string>

namespace tokcredit::cpu {
namespace {

void check_id(const Logits &in, const char *name, int64_t id, int64_t i) {
  if (id != -1 && !is_id(in, id))
    throw std::invalid_argument(std::string("logits: ") + name +
                                ": expected -1 or an id below the vocabulary of " + std::to_string(in.ids) +
                                ", got " + std::to_string(id) + " at " + std::to_string(i));
}

void check_ids(const Logits &in) {
  for (int64_t i = 0; i < in.rows; ++i)
    check_id(in, "tokens", token_of(in, i), i);
  for (int64_t i = 0; i < in.rows * in.choices; ++i)
    check_id(in, "chosen", in.chosen[i], i);
}

template <class Call> void run(const Call &call, void (*rows)(const Call &, int64_t, int64_t), int threads) {
  check_ids(call.in);
  // Chunks of about 64k logits.
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(call.in.vocabulary, 1));
  parallel(call.in.rows, grain, threads, [&](int64_t first, int64_t last) { rows(call, first, last); });
}

} // namespace

void logits(const LogitsForward &f, int threads) { run(f, TOKCREDIT_CHOOSE(logits_rows), threads); }

void logits_state(const LogitsState &s, int threads) { run(s, TOKCREDIT_CHOOSE(logits_state_rows), threads); }

void logits_gradient(const LogitsBackward &b, int threads) {
  if (b.in.vocabulary)
    run(b, TOKCREDIT_CHOOSE(logits_gradient_rows), threads);
}

} // namespace tokcredit::cpu
