#include "ops/array.hpp"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tokcredit::cpu {

void expect_writes([[maybe_unused]] void *data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + page - 1) & ~(page - 1),
                  last = (address + uintptr_t(bytes)) & ~(page - 1);
  // Refusal costs time only.
  if (first < last)
    madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#endif
}

} // namespace tokcredit::cpu
