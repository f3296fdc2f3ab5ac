// Radix selection: eight bits of the key at a time, histograms of integer counts decide how each scope goes
// on; then, where not all of the tokens that equal the threshold are wanted, eight bits of the index at a
// time, so that the first ones are taken. Integer counts add up to the same in any order.
#include "cuda/tile.cuh"
#include "math/dispatch.hpp"
#include "math/order.hpp"
#include "math/quota.hpp"
#include "ops/select.hpp"
#include <cuda/atomic>

namespace tokcredit::cuda {
namespace {

constexpr int bins = 256;
constexpr int64_t batch = 65536;             // scopes that have histograms at one time: 128 MiB of them
constexpr int64_t few = 2 * warps_per_block; // scopes that the last block to count can go on with

enum Status : int32_t { nothing, everything, by_key, by_index, found };

// What is known of a scope's threshold.
template <class Key> struct Goal {
  Key key;       // its leading bits
  int64_t index; // the last index that is taken among equal keys, or its leading bits
  int64_t rank;  // place of the threshold among the tokens that agree so far
  Status status;
};

template <class Key> struct Pass {
  bool index; // of the index, else of the key
  bool ranks;
  bool first; // of the key, or of the index
  int shift;
  int64_t first_scope, scopes; // the batch

  // Neighbours often agree in the leading digits of the key.
  __device__ bool crowded() const { return first && !index; }

  // The eight bits that this pass counts, or -1 for a token that no longer competes.
  __device__ int digit(const Goal<Key> &goal, Key key, int64_t t) const {
    if (index)
      return key == goal.key && (t ^ goal.index) >> shift >> 8 == 0 ? int(t >> shift & (bins - 1)) : -1;
    // Two shifts: one by the whole width would be undefined.
    return Key(key ^ goal.key) >> shift >> 4 >> 4 == 0 ? int(key >> shift & (bins - 1)) : -1;
  }
};

template <class T> using key_t = decltype(order_key(T()));

template <class Key>
__global__ void start(Goal<Key> *goals, int64_t scopes, unsigned long long *counts, int64_t size,
                      unsigned *finished) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < scopes)
    goals[i] = {0, 0, 0, by_key};
  if (i < size)
    counts[i] = 0;
  if (i == 0)
    *finished = 0;
}

__device__ int64_t scope_of(const Select &s, int64_t r) { return s.scope ? s.scope[r] : 0; }

// Finds the digit in which the wanted rank of a scope of the batch falls, and clears its counts for the next
// pass; by a warp.
template <class Key>
__device__ void choose_digit(int64_t place, Goal<Key> *goals, const Quota &wanted, const Pass<Key> &pass,
                             unsigned long long *counts) {
  const int64_t g = pass.first_scope + place;
  Goal<Key> goal = goals[g];
  if (goal.status != (pass.index ? by_index : by_key))
    return;
  __syncwarp(); // all lanes have read the goal that one of them will change
  // Keys from the largest digit down, indices from the smallest up; eight digits per lane.
  constexpr int own = bins / 32;
  const auto digit = [&](int b) {
    const int walk = lane_id() * own + b;
    return pass.index ? walk : bins - 1 - walk;
  };
  counts += place * bins;
  long long sum = 0;
#pragma unroll
  for (int b = 0; b < own; ++b)
    sum += static_cast<long long>(counts[digit(b)]);
  long long upto = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const long long before = __shfl_sync(all_lanes, upto, lane_id() >= step ? lane_id() - step : lane_id());
    upto += lane_id() >= step ? before : 0;
  }
  if (pass.first && !pass.index) {
    const int64_t total = __shfl_sync(all_lanes, upto, 31), k = wanted_of(wanted, g, total);
    const bool inside = k >= 0 && k < total;
    goal.rank = pass.ranks ? total - 1 - k : k - 1;
    if (pass.ranks ? !inside : k <= 0 || k >= total) {
      goal.rank = -1; // in no digit
      if (lane_id() == 0)
        goals[g].status = !pass.ranks && k > 0 ? everything : nothing;
    }
  }
  long long before = upto - sum;
  for (int b = 0; b < own; ++b) {
    const int d = digit(b);
    const long long count = static_cast<long long>(counts[d]);
    counts[d] = 0;
    if (goal.rank >= before && goal.rank < before + count) {
      Goal<Key> next = goal;
      next.rank = goal.rank - before;
      if (pass.index)
        next.index |= int64_t(d) << pass.shift;
      else
        next.key |= Key(d) << pass.shift;
      if (pass.shift == 0) {
        const bool all = pass.index || pass.ranks || next.rank + 1 == count;
        next.status = all ? found : by_index;
        if (!pass.index)
          next.index = all ? INT64_MAX : 0;
      }
      goals[g] = next;
    }
    before += count;
  }
}

template <class Key>
__global__ void __launch_bounds__(block_threads)
    choose_digits(Goal<Key> *goals, Quota wanted, Pass<Key> pass, unsigned long long *counts) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place < pass.scopes)
    choose_digit(place, goals, wanted, pass, counts);
}

// As many blocks at once on a multiprocessor as registers allow, so that enough loads are on their way: what
// the last block does must not take registers from that.
template <class T, class Key = key_t<T>>
__global__ void __launch_bounds__(block_threads, sizeof(Key) == 4 ? 6 : 5)
    count_digits(Select s, Goal<Key> *goals, Pass<Key> pass, int64_t span, unsigned long long *counts,
                 unsigned *finished) {
  const T *x = static_cast<const T *>(s.x);
  if (pass.index && finished) { // few scopes: often none of them has ties to place
    bool any = false;
    for (int g = 0; g < int(pass.scopes); ++g)
      any |= goals[g].status == by_index;
    if (!any)
      return;
  }
  __shared__ unsigned shared[warps_per_block][bins];
  unsigned *own = shared[threadIdx.x / 32];
  for (int b = lane_id(); b < bins; b += 32)
    own[b] = 0;
  __syncwarp();
  int64_t scope = -1; // whose counts are in `own`
  const auto flush = [&] {
    __syncwarp();
    for (int b = lane_id(); scope >= 0 && b < bins; b += 32)
      if (own[b]) {
        atomicAdd(counts + (scope - pass.first_scope) * bins + b, static_cast<unsigned long long>(own[b]));
        own[b] = 0;
      }
    __syncwarp();
  };
  const int64_t from = (blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32) * span;
  each_piece<false>(
      s.rows, min(from, s.rows.size), min(from + span, s.rows.size),
      [&](int64_t r, int64_t first, int64_t last, bool, bool) {
        const int64_t g = scope_of(s, r);
        if (g < pass.first_scope || g >= pass.first_scope + pass.scopes)
          return;
        const Goal<Key> goal = goals[g];
        if (goal.status != (pass.index ? by_index : by_key))
          return;
        if (g != scope)
          flush();
        scope = g;
        each_step<false>(first, last, [&](int64_t t) {
          const Quad<bool> live = live_quad(s.rows, t, first, last);
          const bool any = live.item[0] | live.item[1] | live.item[2] | live.item[3];
          const Quad<T> values = any ? load_quad(x, t, s.rows.size, quads_aligned(x)) : Quad<T>{};
#pragma unroll
          for (int k = 0; k < quad; ++k) {
            const Key key = order_key(values.item[k]);
            const int d = live.item[k] ? pass.digit(goal, key, t + k) : -1;
            if (!pass.crowded()) {
              if (d >= 0)
                atomicAdd(own + d, 1u);
              continue;
            }
            // One of those that agree adds for all.
            const unsigned same = __match_any_sync(all_lanes, d);
            if (d >= 0 && lane_id() == __ffs(int(same)) - 1)
              own[d] += unsigned(__popc(same));
            __syncwarp();
          }
        });
      },
      [](int64_t, int64_t) {});
  flush();
  if (!finished)
    return;
  // The last block has all counts, and goes on with them.
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0)
    is_last = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(*finished).fetch_add(
                  1u, ::cuda::std::memory_order_acq_rel) +
                  1 ==
              gridDim.x;
  __syncthreads();
  if (!is_last)
    return;
  for (int64_t place = threadIdx.x / 32; place < pass.scopes; place += warps_per_block)
    choose_digit(place, goals, s.wanted, pass, counts);
  if (threadIdx.x == 0)
    *finished = 0;
}

template <class T, class Key = key_t<T>>
__global__ void __launch_bounds__(block_threads)
    mark(Select s, const Goal<Key> *goals, int64_t tiles, bool *chosen) {
  const T *x = static_cast<const T *>(s.x);
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const int64_t from = place * tile_size, to = min(from + tile_size, s.rows.size);
  each_piece<false>(
      s.rows, from, to,
      [&](int64_t r, int64_t first, int64_t last, bool, bool) {
        const int64_t g = scope_of(s, r);
        Goal<Key> goal{0, 0, 0, nothing};
        if (g >= 0 && g < s.scopes)
          goal = goals[g];
        each_step<false>(first, last, [&](int64_t t) {
          Quad<bool> out{};
          if (goal.status != nothing)
            out = live_quad(s.rows, t, first, last);
          if (goal.status == found && (out.item[0] | out.item[1] | out.item[2] | out.item[3])) {
            const Quad<T> values = load_quad(x, t, s.rows.size, quads_aligned(x));
#pragma unroll
            for (int k = 0; k < quad; ++k) {
              const Key key = order_key(values.item[k]);
              out.item[k] &= key > goal.key || (key == goal.key && t + k <= goal.index);
            }
          }
          store_quad(chosen, t, first, last, quads_aligned(chosen), out);
        });
      },
      [&](int64_t first, int64_t last) { fill_zero(chosen, first, last); });
}

template <class T>
__global__ void write_values(const Goal<key_t<T>> *goals, accumulate_t<T> *values, int64_t scopes) {
  using A = accumulate_t<T>;
  const int64_t g = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (g < scopes)
    values[g] = goals[g].status == found ? A(load(number_of<T>(goals[g].key))) : A(NAN);
}

// The thresholds of all scopes. For values of a rank (`ranks`) ties do not matter.
template <class T> const Goal<key_t<T>> *find(const char *op, const Select &s, bool ranks, Queue &queue) {
  using Key = key_t<T>;
  const int64_t most = s.scopes < batch ? s.scopes : batch, size = most * bins;
  Goal<Key> *goals;
  unsigned long long *counts;
  unsigned *finished;
  allocate_together(queue, Wanted{goals, s.scopes}, Wanted{counts, size}, Wanted{finished, 1});
  launch(op, queue, start<Key>, ceil_div(size > s.scopes ? size : s.scopes, block_threads), block_threads,
         goals, s.scopes, counts, size, finished);
  if (s.scopes > few)
    finished = nullptr;
  // Long spans empty the shared counts less often; short ones keep a whole device busy.
  int64_t span = tile_size;
  while (span < 16 * tile_size && s.rows.size / span > 16384)
    span *= 2;
  const int64_t blocks = ceil_div(ceil_div(s.rows.size, span), warps_per_block);
  int index_bits = 8;
  while (index_bits < 56 && (s.rows.size - 1) >> index_bits > 0)
    index_bits += 8;
  for (int64_t low = 0; low < s.scopes; low += batch) {
    const int64_t scopes = s.scopes - low < batch ? s.scopes - low : batch;
    const auto run = [&](bool index, int bits) {
      for (int shift = bits - 8; shift >= 0; shift -= 8) {
        const Pass<Key> pass{index, ranks, shift == bits - 8, shift, low, scopes};
        launch(op, queue, count_digits<T>, blocks, block_threads, s, goals, pass, span, counts, finished);
        if (!finished)
          launch(op, queue, choose_digits<Key>, ceil_div(scopes, warps_per_block), block_threads, goals,
                 s.wanted, pass, counts);
      }
    };
    run(false, int(sizeof(Key)) * 8);
    if (!ranks)
      run(true, index_bits);
  }
  return goals;
}

} // namespace

void top_k(const Select &s, bool *chosen, Queue &queue) {
  with_float(s.type, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto *goals = find<T>("top_k", s, false, queue);
    const int64_t tiles = tiles_of(s.rows.size);
    launch("top_k", queue, mark<T>, ceil_div(tiles, warps_per_block), block_threads, s, goals, tiles, chosen);
  });
}

void kth(const Select &s, void *values, Queue &queue) {
  with_float(s.type, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto *goals = find<T>("kth", s, true, queue);
    launch("kth", queue, write_values<T>, ceil_div(s.scopes, block_threads), block_threads, goals,
           static_cast<accumulate_t<T> *>(values), s.scopes);
  });
}

} // namespace tokcredit::cuda
