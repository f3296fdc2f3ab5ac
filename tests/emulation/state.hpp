// What the scheduler (schedule.cpp), the collectives (collectives.cpp) and the checks of memory (memory.cpp)
// know of a running grid.
#pragma once
#include "emulation/engine.hpp"
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace emulation {

// A stretch of one thread's execution between two events that order memory; numbered in the order they begin.
using Segment = uint32_t;

// The last segment of each thread that is known to have happened before, sorted by thread.
using Clock = std::vector<std::pair<uint32_t, Segment>>;
using SharedClock = std::shared_ptr<const Clock>;

// What is remembered of a byte: the segments that wrote and read it last; 0 for none.
struct Cell {
  Segment write = 0, read[2] = {0, 0};
};

struct Block;

struct Fiber {
  enum State { ready, waiting, ended };

  void *stack_pointer = nullptr;
  char *stack = nullptr;
  Block *block = nullptr;
  unsigned thread = 0; // in the block
  State state = ready;
  Site site{}; // where it waits
  unsigned generation = 0;
  unsigned chain = 0; // how many waits for other threads lie one after the other before this point

  Segment segment = 0;
  SharedClock acquired; // what happened before
  SharedClock loaded;   // what a fence to acquire adds
  SharedClock fenced;   // what a relaxed store publishes
};

struct Warp {
  uint64_t slot[2][32];
  unsigned valid[2] = {0, 0};
  unsigned arrived = 0, ended = 0, chain = 0;
  uint32_t epoch = 0;         // barriers of the warp so far
  bool orders_memory = false; // where it meets now
  Site site{};
};

struct Block {
  int64_t index = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::deque<Fiber *> ready;
  unsigned arrived = 0, ended = 0, chain = 0;
  uint32_t epoch = 0; // barriers of the block so far
  Site site{};
  std::vector<char> shared;
  std::vector<Cell> cells; // of the shared memory
  Segment first = 0;       // segments before it belong to the block that had this place earlier
};

// The thread that runs; null on the host's own stack.
extern Fiber *running;

struct Grid {
  const char *op;
  void (*body)(const void *);
  const void *context;
  size_t context_bytes;
  unsigned blocks, threads;
};
extern Grid grid;

// Where stacks, the library and the shared memory of the block that runs lie.
struct Range {
  uintptr_t low = 0, size = 0;
  bool holds(uintptr_t address) const { return address - low < size; }
};
extern Range stacks, image, shared;

// Lets other threads run.
void yield(unsigned cost);
// Lets other threads run until one of them makes this one ready.
void wait(Site);
void make_ready(Fiber &);
// Tells the threads that wait in collectives that this one has ended.
void leave(Fiber &);
std::string text(Site);
// Ends the grid: run_grid throws.
[[noreturn]] void abandon(const std::string &why);

void report(const char *what, const void *pc);
uint64_t random_number();

// Checks of memory. `pc` is where in a kernel.
void begin_grid();
void begin_segment(Fiber &);
void barrier(Block &);
void barrier(Block &, unsigned warp);
void check_access(const void *address, size_t bytes, bool write, bool is_atomic, const void *pc);
void order_atomic(Atomic, const void *address, Order);

} // namespace emulation
