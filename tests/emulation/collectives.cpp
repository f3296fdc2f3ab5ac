// Where the threads of a warp or of a block meet. The last one to come releases the others.
#include "state.hpp"
#include <algorithm>
#include <cstring>
#include <tuple>

namespace emulation {
namespace {

bool same(Site a, Site b) { return a.line == b.line && !strcmp(a.file, b.file) && !strcmp(a.what, b.what); }

void release_warp(Block &block, unsigned w, const Fiber *but) {
  Warp &warp = block.warps[w];
  warp.arrived = 0;
  if (warp.orders_memory) {
    ++warp.epoch;
    barrier(block, w);
  }
  for (unsigned l = 0; l < 32; ++l) {
    Fiber &f = block.fibers[32 * w + l];
    if (f.state == Fiber::ended)
      continue;
    f.chain = warp.chain;
    if (&f != but)
      make_ready(f);
  }
  warp.chain = 0;
}

void release_block(Block &block, const Fiber *but) {
  block.arrived = 0;
  ++block.epoch;
  barrier(block);
  for (Fiber &f : block.fibers) {
    if (f.state == Fiber::ended)
      continue;
    f.chain = block.chain;
    if (&f != but)
      make_ready(f);
  }
  block.chain = 0;
}

// Puts `value` into this lane's slot, and returns all slots when every lane that has not ended is here.
struct Slots {
  const uint64_t *slot;
  unsigned valid;
};
Slots exchange(uint64_t value, Site site, bool orders_memory = false) {
  yield(1);
  Fiber &self = *running;
  Block &block = *self.block;
  const unsigned w = self.thread / 32, lane = self.thread % 32, parity = self.generation++ % 2;
  Warp &warp = block.warps[w];
  if (!warp.arrived) {
    warp.site = site;
    warp.valid[parity] = 0;
  } else if (!same(warp.site, site)) {
    abandon("lanes of a warp meet at " + text(warp.site) + " and at " + text(site));
  }
  warp.slot[parity][lane] = value;
  warp.valid[parity] |= 1u << lane;
  warp.arrived |= 1u << lane;
  warp.chain = std::max(warp.chain, self.chain);
  warp.orders_memory = orders_memory;
  if ((warp.arrived | warp.ended) == ~0u)
    release_warp(block, w, &self);
  else
    wait(site);
  return {warp.slot[parity], warp.valid[parity]};
}

} // namespace

void leave(Fiber &self) {
  Block &block = *self.block;
  const unsigned w = self.thread / 32;
  Warp &warp = block.warps[w];
  warp.ended |= 1u << self.thread % 32;
  ++block.ended;
  // Those that wait do not wait for a thread that has ended.
  if (warp.arrived && (warp.arrived | warp.ended) == ~0u)
    release_warp(block, w, nullptr);
  else if (block.arrived && block.arrived + block.ended == grid.threads)
    release_block(block, nullptr);
}

uint64_t shuffle(uint64_t bits, int from, Site site) {
  const Slots all = exchange(bits, site);
  if (!(all.valid >> from & 1))
    abandon("a value is read from a lane that has ended: " + text(site));
  return all.slot[from];
}

unsigned ballot(bool vote, Site site) {
  const Slots all = exchange(vote, site);
  unsigned votes = 0;
  for (unsigned l = 0; l < 32; ++l)
    votes |= unsigned((all.valid >> l & 1) && all.slot[l]) << l;
  return votes;
}

unsigned match_any(uint64_t bits, Site site) {
  const Slots all = exchange(bits, site);
  unsigned same = 0;
  for (unsigned l = 0; l < 32; ++l)
    same |= unsigned((all.valid >> l & 1) && all.slot[l] == bits) << l;
  return same;
}

unsigned reduce_min(unsigned x, Site site) {
  const Slots all = exchange(x, site);
  for (unsigned l = 0; l < 32; ++l)
    if (all.valid >> l & 1)
      x = std::min(x, unsigned(all.slot[l]));
  return x;
}

int reduce_add(int x, Site site) {
  const Slots all = exchange(uint64_t(unsigned(x)), site);
  unsigned sum = 0;
  for (unsigned l = 0; l < 32; ++l)
    sum += all.valid >> l & 1 ? unsigned(all.slot[l]) : 0;
  return int(sum);
}

void sort_pairs(uint16_t *keys, uint16_t *values, size_t count, int low, int high) {
  std::vector<std::pair<uint16_t, uint16_t>> pairs(count);
  for (size_t i = 0; i < count; ++i)
    pairs[i] = {keys[i], values[i]};
  const unsigned mask = (1u << (high - low)) - 1;
  std::stable_sort(pairs.begin(), pairs.end(), [&](const auto &a, const auto &b) {
    return (unsigned(a.first) >> low & mask) < (unsigned(b.first) >> low & mask);
  });
  for (size_t i = 0; i < count; ++i)
    std::tie(keys[i], values[i]) = pairs[i];
}

void sync_warp(Site site) { exchange(0, site, true); }

void sync_block(Site site) {
  yield(1);
  Fiber &self = *running;
  Block &block = *self.block;
  if (!block.arrived)
    block.site = site;
  else if (!same(block.site, site))
    abandon("threads of a block meet at " + text(block.site) + " and at " + text(site));
  block.chain = std::max(block.chain, self.chain);
  if (++block.arrived + block.ended == grid.threads)
    release_block(block, &self);
  else
    wait(site);
}

} // namespace emulation
