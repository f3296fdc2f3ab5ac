#include "ops/divergence.hpp"
#include "cpu/divergence_rows.hpp"
#include "cpu/parallel.hpp"

namespace tokcredit::cpu {
namespace {

// Chunks of about 32k pairs of logits.
int64_t grain(const DivergenceRows &in) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(in.vocabulary, 1));
}

// Memory of a thread for so many numbers, where a pack begins. It stays for the next rows.
float *memory_of(int64_t count) {
  constexpr int64_t align = 64;
  thread_local std::vector<char> memory;
  const size_t bytes = size_t(count) * sizeof(float) + align;
  if (memory.size() < bytes)
    memory.resize(bytes);
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float *>((at + align - 1) / align * align);
}

} // namespace

void divergence(const DivergenceForward &f, int threads) {
  const auto rows = TOKCREDIT_CHOOSE(divergence_rows);
  const int64_t floats = TOKCREDIT_CHOOSE(floats_of_divergence)(f.in);
  parallel(f.in.rows, grain(f.in), threads,
           [&](int64_t first, int64_t last) { rows(f, first, last, memory_of(floats)); });
}

void divergence_gradient(const DivergenceBackward &b, int threads) {
  const auto rows = TOKCREDIT_CHOOSE(divergence_gradient_rows);
  parallel(b.in.rows, grain(b.in), threads, [&](int64_t first, int64_t last) { rows(b, first, last); });
}

} // namespace tokcredit::cpu
