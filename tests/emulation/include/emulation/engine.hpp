// What kernels that run on the host ask of the emulator: where they are, and everything by which threads
// meet.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulation {

struct Index {
  unsigned x, y, z;
};

// Constant for the thread that asks, so a compiler may ask once.
__attribute__((const)) Index thread_index();
__attribute__((const)) Index block_index();
__attribute__((const)) Index block_size();
__attribute__((const)) Index grid_size();

// The place in the source where threads meet; lanes that meet in different places are an error.
struct Site {
  const char *what;
  const char *file;
  int line;
};

// Collectives of the 32 lanes of a warp; none of them but sync_warp orders memory.
uint64_t shuffle(uint64_t bits, int from, Site);
unsigned ballot(bool vote, Site);
unsigned match_any(uint64_t bits, Site);
unsigned reduce_min(unsigned, Site);
int reduce_add(int, Site);
void sync_warp(Site);
void sync_block(Site);

enum class Order { relaxed, acquire, release, acquire_release };
enum class Atomic { load, store, add, bit_or, largest };

// One atomic operation on 4 or 8 bytes; returns what was there before.
uint64_t atomic(Atomic, void *address, size_t bytes, uint64_t operand, Order);
void fence(Order);

// Sorts pairs by the bits [low, high) of their keys, stably; not checked as accesses of the thread that asks.
void sort_pairs(uint16_t *keys, uint16_t *values, size_t count, int low, int high);

// Runs `body(context)` once for each thread of the grid, and returns when all have ended.
void run_grid(const char *op, void (*body)(const void *), const void *context, size_t context_bytes,
              unsigned blocks, unsigned threads);

// What the host does to device memory between kernels: the bytes count as written.
void host_writes(const void *memory, size_t bytes);
void host_clears(void *memory, size_t bytes);

// A primitive of CUB, which launches one kernel at least.
void host_launches();

} // namespace emulation
