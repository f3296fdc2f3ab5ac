#include "ops/memory.hpp"
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tokcredit::cpu {
namespace {

enum class Advice { large_pages, may_be_taken };

// Refusal costs time only.
void advise([[maybe_unused]] const Memory &memory, [[maybe_unused]] Advice advice) {
#if defined(MADV_HUGEPAGE) && defined(MADV_FREE)
  madvise(memory.data, memory.bytes, advice == Advice::large_pages ? MADV_HUGEPAGE : MADV_FREE);
#endif
}

// Whoever finds it locked does without: a process forked while another thread held the lock will never see it
// open.
struct Cache {
  std::mutex guard;
  std::vector<Memory> kept; // the longest kept first
  int64_t bytes = 0;

  Memory remove(std::vector<Memory>::iterator at) {
    const Memory memory = *at;
    bytes -= memory.bytes;
    kept.erase(at);
    return memory;
  }
};

// Never destroyed: results may outlive the end of the program's main.
Cache &cache() {
  static Cache &only = *new Cache;
  return only;
}

} // namespace

Memory take(int64_t bytes) {
  bytes = (bytes + page_bytes - 1) / page_bytes * page_bytes;
  if (std::unique_lock<std::mutex> lock(cache().guard, std::try_to_lock); lock) {
    auto &kept = cache().kept;
    auto best = kept.end();
    for (auto at = kept.begin(); at != kept.end(); ++at)
      if (at->bytes >= bytes && at->bytes <= 2 * bytes && (best == kept.end() || at->bytes <= best->bytes))
        best = at;
    if (best != kept.end())
      return cache().remove(best);
  }
  const Memory memory{std::aligned_alloc(page_bytes, bytes), bytes};
  if (!memory.data)
    throw std::bad_alloc();
  advise(memory, Advice::large_pages);
  return memory;
}

void give_back(Memory memory) {
  if (memory.bytes <= kept_bytes) {
    if (std::unique_lock<std::mutex> lock(cache().guard, std::try_to_lock); lock) {
      advise(memory, Advice::may_be_taken);
      cache().kept.push_back(memory);
      cache().bytes += memory.bytes;
      while (cache().bytes > kept_bytes)
        std::free(cache().remove(cache().kept.begin()).data);
      return;
    }
  }
  std::free(memory.data);
}

void empty_cache() {
  if (std::unique_lock<std::mutex> lock(cache().guard, std::try_to_lock); lock)
    while (!cache().kept.empty())
      std::free(cache().remove(cache().kept.begin()).data);
}

} // namespace tokcredit::cpu
