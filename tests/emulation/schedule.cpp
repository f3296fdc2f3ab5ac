// Threads of a grid as fibers of one host thread. Some blocks are resident at a time; the scheduler runs one
// of them for a while, then another. Whose turn it is, is drawn from a seed, and changes at every collective,
// atomic operation and, in the instrumented build, at any access to memory.
#include "state.hpp"
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <numeric>
#include <stdexcept>
#include <sys/mman.h>

extern "C" void emulation_switch(void **save, void *load);

// System V x86-64: what a call preserves is saved on the stack that is left.
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

namespace emulation {

Fiber *running = nullptr;
Grid grid;
Range stacks, image, shared;

namespace {

constexpr size_t stack_bytes = 64 << 10, most_stacks = 96 << 10;
constexpr uint64_t canary = 0x5ca1ab1e0ddba11;
// Loads of atomics in a row, by all threads, after which nobody is expected to write what they wait for.
constexpr uint64_t patience = 400000;

enum class Pick { first, random, last };

struct Policy {
  size_t residents;
  unsigned quantum;
  Pick pick;
  bool shuffled; // the order in which blocks start
};

uint64_t seed = 1, state = 1;
bool lockstep = false;
unsigned longest_chain = 0;
uint64_t launches = 0; // kernels, and what the host does between them

void *host_stack = nullptr;
std::vector<char *> free_stacks;
size_t used_stacks = 0;
std::vector<std::unique_ptr<Block>> idle; // kept for the next grid
Block *entered = nullptr;                 // whose shared memory lies in the segment
std::string failure;
int64_t quantum_left = 0;
uint64_t loads_in_a_row = 0;
unsigned char garbage = 0xff;

char *take_stack() {
  if (free_stacks.empty()) {
    if (!stacks.low) {
      void *memory = mmap(nullptr, stack_bytes * most_stacks, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED)
        throw std::bad_alloc();
      stacks = {reinterpret_cast<uintptr_t>(memory), stack_bytes * most_stacks};
    }
    if (used_stacks == most_stacks)
      throw std::runtime_error("emulation: too many threads at one time");
    free_stacks.push_back(reinterpret_cast<char *>(stacks.low) + stack_bytes * used_stacks++);
    memcpy(free_stacks.back(), &canary, sizeof canary);
  }
  char *stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

void to_scheduler() {
  Fiber *self = running;
  running = nullptr;
  emulation_switch(&self->stack_pointer, host_stack);
}

void run_fiber() {
  grid.body(grid.context);
  Fiber &self = *running;
  self.state = Fiber::ended;
  longest_chain = std::max(longest_chain, self.chain);
  loads_in_a_row = 0;
  leave(self);
  to_scheduler();
  __builtin_unreachable();
}

void start_block(Block &block, int64_t index) {
  block.index = index;
  block.fibers.resize(grid.threads);
  block.warps.assign((grid.threads + 31) / 32, Warp());
  block.ready.clear();
  block.arrived = block.ended = block.chain = 0;
  block.epoch = 0;
  block.shared.assign(shared.size, char(garbage));
  for (unsigned t = 0; t < grid.threads; ++t) {
    Fiber &f = block.fibers[t];
    f = Fiber();
    f.block = &block;
    f.thread = t;
    f.stack = take_stack();
    // The stack as emulation_switch leaves one: six registers, and where to return to; aligned as at a call.
    void **top = reinterpret_cast<void **>(f.stack + stack_bytes) - 1;
    *--top = reinterpret_cast<void *>(&run_fiber);
    f.stack_pointer = top - 6;
    begin_segment(f);
    if (t == 0)
      block.first = f.segment;
    block.ready.push_back(&f);
  }
}

void end_block(Block &block) {
  for (Fiber &f : block.fibers) {
    uint64_t found;
    memcpy(&found, f.stack, sizeof found);
    if (found != canary)
      throw std::runtime_error("emulation: a stack overflowed");
    free_stacks.push_back(f.stack);
  }
}

// Brings the block's shared memory into the segment of the host thread.
void enter(Block &block) {
  if (entered == &block)
    return;
  void *memory = reinterpret_cast<void *>(shared.low);
  if (entered)
    memcpy(entered->shared.data(), memory, shared.size);
  memcpy(memory, block.shared.data(), shared.size);
  entered = &block;
}

Fiber *pick(Block &block, Pick how) {
  std::deque<Fiber *> &ready = block.ready;
  if (how == Pick::random || (how == Pick::last && random_number() % 24 == 0))
    std::swap(ready[random_number() % ready.size()], ready.front());
  else if (how == Pick::last)
    std::swap(ready.back(), ready.front());
  Fiber *f = ready.front();
  ready.pop_front();
  return f;
}

void run_block(Block &block, const Policy &policy) {
  enter(block);
  quantum_left = lockstep ? int64_t(block.ready.size()) : int64_t(1 + random_number() % policy.quantum);
  while (quantum_left-- > 0 && !block.ready.empty() && failure.empty()) {
    Fiber &f = *pick(block, policy.pick);
    running = &f;
    emulation_switch(&host_stack, f.stack_pointer);
    if (f.state == Fiber::ready)
      block.ready.push_back(&f);
  }
  if (!block.ready.empty() || block.ended == grid.threads || !failure.empty())
    return;
  for (const Fiber &f : block.fibers)
    if (f.state == Fiber::waiting) {
      failure = "deadlock: block " + std::to_string(block.index) + ", thread " + std::to_string(f.thread) +
                " waits for ever in " + text(f.site);
      return;
    }
}

Policy draw_policy() {
  if (lockstep)
    return {grid.blocks, 1, Pick::first, false};
  const Pick picks[] = {Pick::first, Pick::random, Pick::last};
  const unsigned quanta[] = {300, 3000, 30000};
  Policy p{};
  p.residents = 1 + random_number() % 6;
  p.quantum = quanta[random_number() % 3];
  p.pick = picks[random_number() % 3];
  p.shuffled = random_number() % 2;
  return p;
}

int find_segments(dl_phdr_info *info, size_t, void *) {
  const auto here = reinterpret_cast<uintptr_t>(&find_segments);
  Range found;
  const ElfW(Phdr) *thread_local_segment = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) &segment = info->dlpi_phdr[i];
    if (segment.p_type == PT_LOAD) {
      found.low = found.low ? found.low : info->dlpi_addr + segment.p_vaddr;
      found.size = info->dlpi_addr + segment.p_vaddr + segment.p_memsz - found.low;
    } else if (segment.p_type == PT_TLS) {
      thread_local_segment = &segment;
    }
  }
  if (!found.holds(here))
    return 0;
  image = found;
  shared = {};
  if (thread_local_segment)
    shared = {reinterpret_cast<uintptr_t>(info->dlpi_tls_data), thread_local_segment->p_memsz};
  return 1;
}

} // namespace

Index thread_index() { return {running->thread, 0, 0}; }
Index block_index() { return {unsigned(running->block->index), 0, 0}; }
Index block_size() { return {grid.threads, 1, 1}; }
Index grid_size() { return {grid.blocks, 1, 1}; }

uint64_t random_number() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state * 0x2545f4914f6cdd1dull >> 11;
}

std::string text(Site s) {
  const char *slash = strrchr(s.file, '/');
  return std::string(s.what) + " at " + (slash ? slash + 1 : s.file) + ":" + std::to_string(s.line);
}

void make_ready(Fiber &f) {
  f.state = Fiber::ready;
  f.block->ready.push_back(&f);
}

void wait(Site site) {
  running->state = Fiber::waiting;
  running->site = site;
  to_scheduler();
}

void yield(unsigned cost) {
  quantum_left -= cost;
  to_scheduler();
}

void abandon(const std::string &why) {
  failure = why;
  to_scheduler();
  __builtin_unreachable();
}

void host_launches() { ++launches; }

uint64_t atomic(Atomic what, void *address, size_t bytes, uint64_t operand, Order order) {
  yield(32); // a spinner soon gives way to other blocks
  check_access(address, bytes, what != Atomic::load, true, __builtin_return_address(0));
  order_atomic(what, address, order);
  if (what == Atomic::load && ++loads_in_a_row > (lockstep ? 1000 : 1) * patience)
    abandon("livelock: threads wait for what nobody writes");
  if (what != Atomic::load)
    loads_in_a_row = 0;
  uint64_t before = 0;
  memcpy(&before, address, bytes);
  if (what == Atomic::store)
    memcpy(address, &operand, bytes);
  else if (what == Atomic::add)
    memcpy(address, &(operand += before), bytes);
  else if (what == Atomic::bit_or)
    memcpy(address, &(operand |= before), bytes);
  else if (what == Atomic::largest && operand > before)
    memcpy(address, &operand, bytes);
  return before;
}

void run_grid(const char *op, void (*body)(const void *), const void *context, size_t context_bytes,
              unsigned blocks, unsigned threads) {
  [[maybe_unused]] static thread_local volatile char touched; // the segment is made when it is first used
  touched = 0;
  ++launches;
  dl_iterate_phdr(find_segments, nullptr);
  grid = {op, body, context, context_bytes, blocks, threads};
  state = (seed += 0x9e3779b97f4a7c15ull) | 1;
  const unsigned char bytes[] = {0xff, 0x5a, 0x00, 0x7f};
  garbage = bytes[random_number() % 4];
  failure.clear();
  loads_in_a_row = 0;
  entered = nullptr;
  begin_grid();

  const Policy policy = draw_policy();
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (policy.shuffled)
    for (unsigned i = blocks; i > 1; --i)
      std::swap(order[i - 1], order[random_number() % i]);

  std::vector<std::unique_ptr<Block>> resident;
  size_t next = 0, turn = 0;
  while (failure.empty() && (next < blocks || !resident.empty())) {
    while (resident.size() < policy.residents && next < blocks) {
      if (idle.empty())
        idle.push_back(std::make_unique<Block>());
      resident.push_back(std::move(idle.back()));
      idle.pop_back();
      start_block(*resident.back(), order[next++]);
    }
    turn = policy.pick == Pick::first ? (turn + 1) % resident.size() : random_number() % resident.size();
    Block &block = *resident[turn];
    run_block(block, policy);
    if (block.ended == threads) {
      end_block(block);
      entered = entered == &block ? nullptr : entered;
      idle.push_back(std::move(resident[turn]));
      resident.erase(resident.begin() + std::ptrdiff_t(turn));
    }
  }
  for (std::unique_ptr<Block> &block : resident) { // of a grid that was abandoned
    for (Fiber &f : block->fibers)
      free_stacks.push_back(f.stack);
    idle.push_back(std::move(block));
  }
  if (!failure.empty())
    throw std::runtime_error(std::string("emulation: ") + op + ": " + failure);
}

} // namespace emulation

extern "C" {
void emulation_seed(uint64_t seed) { emulation::seed = seed; }
// All blocks at once, each thread one step at a time: waits are then as long as on a device that holds the
// grid.
void emulation_lockstep(int on) { emulation::lockstep = on != 0; }
uint64_t emulation_launches() { return std::exchange(emulation::launches, 0u); }
unsigned emulation_longest_chain() { return std::exchange(emulation::longest_chain, 0u); }
}
