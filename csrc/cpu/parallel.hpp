// A chunker over threads. Chunks are fixed by `grain`, never by the number of threads, so a result that is
// combined per chunk has the same bits on any machine.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace tokcredit::cpu {

// Calls body(first, last) for consecutive chunks of [0, count), in threads that are started for this call.
// Below `grain` items it runs on the caller.
template <class Body> void parallel(int64_t count, int64_t grain, int threads, Body &&body) {
  const int64_t chunks = (count + grain - 1) / grain;
  if (chunks <= 1 || threads <= 1) {
    for (int64_t c = 0; c < chunks; ++c)
      body(c * grain, std::min(count, (c + 1) * grain));
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto work = [&] {
    try {
      for (int64_t c; (c = next.fetch_add(1)) < chunks;)
        body(c * grain, std::min(count, (c + 1) * grain));
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
      next = chunks;
    }
  };
  const auto wanted = size_t(std::min<int64_t>(threads, chunks) - 1);
  std::vector<std::thread> helpers;
  helpers.reserve(wanted);
  try {
    while (helpers.size() < wanted)
      helpers.emplace_back(work);
  } catch (const std::system_error &) {
    // The process may not have more threads: the ones there are do all the work.
  }
  work();
  for (auto &helper : helpers)
    helper.join();
  if (failure)
    std::rethrow_exception(failure);
}

// Tokens per chunk. Loops that only read or write them are done with more before another thread has started.
constexpr int64_t tokens_per_chunk = 1 << 16, light = 1 << 20;

// Rows per chunk so that a chunk is about so many tokens.
inline int64_t row_grain(int64_t rows, int64_t tokens, int64_t per_chunk = tokens_per_chunk) {
  return std::max<int64_t>(1, rows * per_chunk / std::max<int64_t>(tokens, 1));
}

} // namespace tokcredit::cpu
