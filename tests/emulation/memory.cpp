// Which memory a kernel may touch, and in which order. The instrumented build compiles the kernels with
// -fsanitize=thread and links no runtime for it: the calls that the compiler puts before every access are
// defined here.
//
// Two accesses to a byte, at least one of them a write, must be ordered: same thread, a barrier of their
// block or of their warp between them, or a release that was acquired. Shuffles and votes order nothing.
#include "emulation/queue.hpp"
#include "state.hpp"
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <unordered_map>

namespace emulation {
namespace {

#ifdef EMULATION_INSTRUMENTED
constexpr bool instrumented = true;
#else
constexpr bool instrumented = false;
#endif

// An array of the call, or scratch.
struct Region {
  uintptr_t low, size;
  bool scratch;
  Cell *cells; // one per byte, from calloc; with instrumentation only
};
std::vector<Region> regions;
size_t last_hit = 0;

// Who a segment belongs to. A cell's flag says that the access was atomic.
struct Owner {
  uint32_t thread, block_epoch, warp_epoch;
};
constexpr Segment atomic_flag = 1u << 31;
std::vector<Owner> owners;
Segment grid_first = 1, next_segment = 1;

std::unordered_map<const void *, SharedClock> released;
std::unordered_map<const void *, unsigned> chains;

std::set<std::pair<std::string, const void *>> seen;
std::string reports;
uint64_t accesses = 0, allocations = 0;
int64_t until_yield = 1;

Region *region_of(uintptr_t address) {
  if (last_hit < regions.size() && address - regions[last_hit].low < regions[last_hit].size)
    return &regions[last_hit];
  for (size_t i = 0; i < regions.size(); ++i)
    if (address - regions[i].low < regions[i].size) {
      last_hit = i;
      return &regions[i];
    }
  return nullptr;
}

void add_region(void *memory, int64_t bytes, bool scratch) {
  const auto low = reinterpret_cast<uintptr_t>(memory);
  for (const Region &r : regions)
    if (r.low == low && r.size >= uintptr_t(bytes))
      return;
  auto *cells = instrumented ? static_cast<Cell *>(calloc(size_t(bytes), sizeof(Cell))) : nullptr;
  regions.push_back({low, uintptr_t(bytes), scratch, cells});
}

const Owner &owner(Segment s) { return owners[(s & ~atomic_flag) - grid_first]; }

// Whether `early` ends before what `late` knew of.
bool precedes(Segment early, Segment late) {
  const Owner &a = owner(early), &b = owner(late);
  if (a.thread == b.thread)
    return (early & ~atomic_flag) <= (late & ~atomic_flag);
  if (a.thread / grid.threads == b.thread / grid.threads && a.block_epoch < b.block_epoch)
    return true;
  return a.thread / 32 == b.thread / 32 && a.warp_epoch < b.warp_epoch;
}

bool acquires(Order order) { return order == Order::acquire || order == Order::acquire_release; }
bool releases(Order order) { return order == Order::release || order == Order::acquire_release; }

bool ordered(Segment early, const Fiber &now) {
  if ((early & ~atomic_flag) < grid_first || precedes(early, now.segment))
    return true;
  if (!now.acquired)
    return false;
  for (const auto &[thread, segment] : *now.acquired)
    if (precedes(early, segment))
      return true;
  return false;
}

void join(SharedClock &into, const SharedClock &other) {
  if (!other || into == other)
    return;
  if (!into) {
    into = other;
    return;
  }
  Clock merged;
  merged.reserve(into->size() + other->size());
  auto a = into->begin(), b = other->begin();
  while (a != into->end() || b != other->end()) {
    if (b == other->end() || (a != into->end() && a->first < b->first)) {
      merged.push_back(*a++);
    } else if (a == into->end() || b->first < a->first) {
      merged.push_back(*b++);
    } else {
      merged.emplace_back(a->first, std::max(a->second, b->second));
      ++a, ++b;
    }
  }
  into = std::make_shared<const Clock>(std::move(merged));
}

// All that this thread has done and knows of.
SharedClock knowledge(const Fiber &f) {
  SharedClock all = std::make_shared<const Clock>(Clock{{owner(f.segment).thread, f.segment}});
  join(all, f.acquired);
  return all;
}

void barrier(Fiber *first, Fiber *last) {
  if (!instrumented)
    return;
  SharedClock all;
  for (Fiber *f = first; f != last; ++f)
    join(all, f->acquired);
  for (Fiber *f = first; f != last; ++f)
    if (f->state != Fiber::ended) {
      f->acquired = all;
      begin_segment(*f);
    }
}

void check_cell(Cell &cell, Segment first, bool write, Segment mine, bool must_be_written, const void *pc) {
  const Fiber &self = *running;
  const bool both_atomic = (cell.write & atomic_flag) && (mine & atomic_flag);
  const bool known = (cell.write & ~atomic_flag) >= first;
  if (must_be_written && !known)
    report("read of memory that nobody has written", pc);
  if (known && !both_atomic && !ordered(cell.write, self))
    report(write ? "race: two writes" : "race: a read after a write", pc);
  if (write) {
    for (const Segment read : cell.read)
      if ((read & ~atomic_flag) >= first && !((read & atomic_flag) && (mine & atomic_flag)) &&
          !ordered(read, self))
        report("race: a write after a read", pc);
    cell = {mine, {0, 0}};
    return;
  }
  // Reads that happened before this one need not be remembered.
  const size_t at = (cell.read[0] & ~atomic_flag) < first || ordered(cell.read[0], self) ? 0
                    : (cell.read[1] & ~atomic_flag) < first || ordered(cell.read[1], self)
                        ? 1
                        : random_number() % 2;
  cell.read[at] = mine;
}

} // namespace

void report(const char *what, const void *pc) {
  const auto offset = reinterpret_cast<uintptr_t>(pc) - image.low;
  if (!seen.insert({what, pc}).second)
    return;
  char line[64];
  snprintf(line, sizeof line, "%lx ", static_cast<unsigned long>(offset - 1));
  reports += line + std::string(grid.op) + ": " + what + "\n";
}

void begin_grid() {
  released.clear();
  chains.clear();
  owners.clear();
  grid_first = next_segment;
}

void begin_segment(Fiber &f) {
  if (!instrumented)
    return;
  const unsigned thread = unsigned(f.block->index) * grid.threads + f.thread;
  owners.push_back({thread, f.block->epoch, f.block->warps[f.thread / 32].epoch});
  f.segment = next_segment++;
}

void barrier(Block &block) { barrier(block.fibers.data(), block.fibers.data() + block.fibers.size()); }

void barrier(Block &block, unsigned warp) {
  barrier(block.fibers.data() + 32 * warp, block.fibers.data() + 32 * (warp + 1));
}

void check_access(const void *address, size_t bytes, bool write, bool is_atomic, const void *pc) {
  const auto low = reinterpret_cast<uintptr_t>(address);
  if (!instrumented || stacks.holds(low))
    return;
  if (low - reinterpret_cast<uintptr_t>(grid.context) < grid.context_bytes || (image.holds(low) && !write))
    return;
  ++accesses;
  Fiber &self = *running;
  const Segment mine = self.segment | (is_atomic ? atomic_flag : 0);
  if (shared.holds(low)) {
    std::vector<Cell> &cells = self.block->cells;
    cells.resize(shared.size);
    for (size_t i = 0; i < bytes; ++i)
      check_cell(cells[low - shared.low + i], self.block->first, write, mine, !write, pc);
    return;
  }
  const Region *region = region_of(low);
  if (!region || low + bytes > region->low + region->size) {
    report(write ? "write outside of every array" : "read outside of every array", pc);
    abandon("access outside of every array");
  }
  for (size_t i = 0; i < bytes; ++i) {
    Cell &cell = region->cells[low - region->low + i];
    check_cell(cell, grid_first, write, mine, false, pc);
    if (region->scratch && !write && !cell.write)
      report("read of scratch that nobody has written", pc);
  }
}

void host_clears(void *memory, size_t bytes) {
  host_launches();
  memset(memory, 0, bytes);
  host_writes(memory, bytes);
}

void host_writes(const void *memory, size_t bytes) {
  if (!instrumented || !bytes)
    return;
  const Region *region = region_of(reinterpret_cast<uintptr_t>(memory));
  if (!region || reinterpret_cast<uintptr_t>(memory) + bytes > region->low + region->size) {
    report("write outside of every array by the host", nullptr);
    return;
  }
  Cell *cells = region->cells + (reinterpret_cast<uintptr_t>(memory) - region->low);
  // A segment of no grid: before everything that follows.
  std::fill(cells, cells + bytes, Cell{next_segment++, {0, 0}});
}

void order_atomic(Atomic what, const void *address, Order order) {
  Fiber &self = *running;
  unsigned &chain = chains[address];
  if (what == Atomic::load)
    self.chain = std::max(self.chain, chain);
  else if (what == Atomic::store)
    chain = self.chain + 1;
  if (!instrumented)
    return;
  SharedClock &clock = released[address];
  if (what != Atomic::store)
    join(acquires(order) ? self.acquired : self.loaded, clock);
  if (what == Atomic::load)
    return;
  if (what == Atomic::store) // an addition carries on what was released before, a store does not
    clock = nullptr;
  join(clock, releases(order) ? knowledge(self) : self.fenced);
  begin_segment(self);
}

void fence(Order order) {
  if (!instrumented)
    return;
  Fiber &self = *running;
  if (acquires(order))
    join(self.acquired, self.loaded);
  if (releases(order)) {
    self.fenced = knowledge(self);
    begin_segment(self);
  }
}

void Queue::know(void *array, int64_t bytes) {
  if (bytes > 0)
    add_region(array, bytes, false);
}

void *Queue::allocate(int64_t bytes) {
  ++allocations;
  const size_t rounded = (size_t(bytes) + 511) / 512 * 512;
  void *memory = aligned_alloc(512, std::max(rounded, size_t(512)));
  static const unsigned char garbage[] = {0xff, 0x5a, 0x7f, 0xa5};
  memset(memory, garbage[random_number() % 4], rounded);
  scratch_.push_back(memory);
  if (bytes > 0)
    add_region(memory, bytes, true);
  return memory;
}

Queue::~Queue() {
  for (void *memory : scratch_)
    free(memory);
  for (const Region &r : regions)
    free(r.cells);
  regions.clear();
}

} // namespace emulation

#define EMULATION_PC __builtin_return_address(0)

extern "C" {

// What was found since the last call, a line each: offset in the library, operation, what.
const char *emulation_reports() {
  static std::string taken;
  taken = std::exchange(emulation::reports, {});
  emulation::seen.clear();
  return taken.c_str();
}
uint64_t emulation_accesses() { return emulation::accesses; }
uint64_t emulation_allocations() { return std::exchange(emulation::allocations, 0u); }

static void accessed(const void *address, size_t bytes, bool write, const void *pc) {
  using namespace emulation;
  if (!running || stacks.holds(reinterpret_cast<uintptr_t>(address)))
    return;
  if (--until_yield <= 0) {
    until_yield = int64_t(1 + random_number() % 400);
    yield(8);
  }
  check_access(address, bytes, write, false, pc);
}

#define EMULATION_ACCESS(bytes)                                                                              \
  void __tsan_read##bytes(void *p) { accessed(p, bytes, false, EMULATION_PC); }                              \
  void __tsan_write##bytes(void *p) { accessed(p, bytes, true, EMULATION_PC); }                              \
  void __tsan_unaligned_read##bytes(void *p) { accessed(p, bytes, false, EMULATION_PC); }                    \
  void __tsan_unaligned_write##bytes(void *p) { accessed(p, bytes, true, EMULATION_PC); }
EMULATION_ACCESS(1)
EMULATION_ACCESS(2)
EMULATION_ACCESS(4)
EMULATION_ACCESS(8)
EMULATION_ACCESS(16)
void __tsan_read_range(void *p, size_t bytes) { accessed(p, bytes, false, EMULATION_PC); }
void __tsan_write_range(void *p, size_t bytes) { accessed(p, bytes, true, EMULATION_PC); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_vptr_read(void *) {}

// The handlers of -fsanitize=alignment,bounds,shift.
void __ubsan_handle_type_mismatch_v1(void *, void *) { emulation::report("misaligned access", EMULATION_PC); }
void __ubsan_handle_out_of_bounds(void *, void *) { emulation::report("index out of bounds", EMULATION_PC); }
void __ubsan_handle_shift_out_of_bounds(void *, void *, void *) {
  emulation::report("bad shift", EMULATION_PC);
}
}
