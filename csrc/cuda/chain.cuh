// Carries from place to place along a row, in one pass over the data (decoupled look-back, Merrill and
// Garland 2016), with the same bits in any schedule: a carry is always the left fold of the totals since the
// row's first place, wherever the look-back happens to find it. Every place publishes a carry in the end, so
// a place waits only for places before it, whatever the rows.
#pragma once
#include "cuda/tile.cuh"
#include <cuda/atomic>

namespace tokcredit::cuda {

// State has `then(next)`: first this, then the next.
template <class State> struct Chain {
  enum Known : unsigned { nothing, total, carry };
  unsigned long long
      *ticket;     // blocks take turns in the order they start, so a block waits only for blocks that run
  unsigned *known; // per place
  State *totals;   // what the place does to the state of the row that goes on after it
  State *carries;  // that row's state at the place's end

  Chain(const char *op, Queue &queue, int64_t places) {
    const int64_t bytes = 8 + places * int64_t(sizeof(unsigned));
    ticket = static_cast<unsigned long long *>(queue.allocate(bytes));
    known = reinterpret_cast<unsigned *>(ticket + 1);
    clear(op, queue, ticket, bytes);
    totals = queue.allocate_array<State>(places);
    carries = queue.allocate_array<State>(places);
  }

  // The turn of this block.
  __device__ int64_t turn() const {
    __shared__ unsigned long long turn;
    if (threadIdx.x == 0)
      turn = atomicAdd(ticket, 1ull);
    __syncthreads();
    return int64_t(turn);
  }

  // By one warp, for its place.
  __device__ void publish(int64_t place, Known what, const State &state) const {
    if (lane_id() != 0)
      return;
    (what == total ? totals : carries)[place] = state;
    ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(known[place])
        .store(what, ::cuda::std::memory_order_release);
  }

  // The state with which the row that was begun in an earlier place arrives at this one; by one warp.
  __device__ State arriving(int64_t place) const {
    const int64_t at = place - 1 - lane_id();
    for (;;) {
      // Relaxed while nothing has changed: to acquire empties the cache of the multiprocessor.
      const unsigned found = at < 0
                                 ? unsigned(nothing)
                                 : ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(known[at]).load(
                                       ::cuda::std::memory_order_relaxed);
      const int nearest = __ffs(int(__ballot_sync(all_lanes, found == carry))) - 1;
      const unsigned between = (1u << max(nearest, 0)) - 1;
      const bool ready = (__ballot_sync(all_lanes, found != nothing) & between) == between;
      if (nearest < 0 || !ready)
        continue;
      ::cuda::atomic_thread_fence(::cuda::std::memory_order_acquire, ::cuda::thread_scope_device);
      State mine{};
      if (lane_id() <= nearest)
        mine = (found == carry ? carries : totals)[at];
      State state = from_lane(mine, nearest);
#pragma unroll 1 // most of the time the nearest is near
      for (int l = nearest - 1; l >= 0; --l)
        state = state.then(from_lane(mine, l));
      return state;
    }
  }
};

} // namespace tokcredit::cuda
