// Memory of large results on the CPU.
//
// Memory new to a process costs several times what writing it does: the system hands it over page by page,
// zeroed, as it is first written. So on Linux pages are of 2 MiB where the system has them, and what a result
// leaves is kept for the results that follow: up to `kept_bytes`, which the system takes back from us when it
// is short.
#pragma once
#include <cstdint>

namespace tokcredit::cpu {

constexpr int64_t page_bytes = int64_t(1) << 21, kept_bytes = int64_t(1) << 28;

struct Memory {
  void *data;
  int64_t bytes;
};

// At least so many bytes, in any state; throws std::bad_alloc.
Memory take(int64_t bytes);

// From any thread, with or without the interpreter; throws nothing.
void give_back(const Memory &);

// Returns to the system what is kept.
void empty_cache();

} // namespace tokcredit::cpu
