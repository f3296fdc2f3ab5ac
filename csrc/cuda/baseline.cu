// Scans give energies and rewards-to-go along the rows. Then the offsets of each group are cut into
// stretches, and a warp per stretch walks the group's rows in their order, once for the sums and once to
// write: a lane owns its offsets, so nothing is shared. How many stretches there are is only known on the
// device; their bound is launched.
#include "cuda/sort.cuh"
#include "math/dispatch.hpp"
#include "math/energy.hpp"
#include "ops/baseline.hpp"
#include "ops/scan.hpp"
#include <cub/device/device_scan.cuh>

namespace tokcredit::cuda {
namespace {

constexpr const char *op = "baseline";
constexpr int own = 2; // offsets of a lane
constexpr int64_t stretch = 32 * own;

// The rows of group g are rows[starts[g]] to rows[starts[g + 1] - 1], in their order.
struct Members {
  const uint32_t *rows;
  const int64_t *starts;
};

template <class T>
__global__ void __launch_bounds__(block_threads) find_energies(Baseline b, accumulate_t<T> *energies) {
  using A = accumulate_t<T>;
  const int64_t t = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (t < b.rows.size)
    energies[t] = energy(A(load(static_cast<const T *>(b.log_probs)[t])),
                         A(load(static_cast<const T *>(b.squares)[t])));
}

__global__ void make_keys(Baseline b, uint32_t *keys, uint32_t *rows) {
  const int64_t r = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (r < b.rows.count) {
    keys[r] = uint32_t(min(max(b.group[r], int64_t(0)), b.groups - 1));
    rows[r] = uint32_t(r);
  }
}

// Stretches of the longest row of each group; a warp per group.
__global__ void __launch_bounds__(block_threads)
    count_stretches(Baseline b, Members members, int64_t *counts) {
  const int64_t g = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (g >= b.groups)
    return;
  int64_t longest = 0;
  for (int64_t m = members.starts[g] + lane_id(); m < members.starts[g + 1]; m += 32)
    longest = max(longest, span_of(b.rows, members.rows[m]).length());
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    longest = max(longest, from_lane(longest, lane_id() ^ step));
  if (lane_id() == 0)
    counts[g] = ceil_div(longest, stretch);
}

// `upto`: stretches of the groups up to and including each. Where rewards are per token, advantages hold G.
template <class T>
__global__ void __launch_bounds__(block_threads)
    write_advantages(Baseline b, Members members, const int64_t *upto, const accumulate_t<T> *energy) {
  using A = accumulate_t<T>;
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  const int64_t g = count_at_most(upto, b.groups, place);
  if (g == b.groups)
    return;
  const int64_t from = (place - (g > 0 ? upto[g - 1] : 0)) * stretch + lane_id();
  A *advantages = static_cast<A *>(b.advantages), *returns = static_cast<A *>(b.returns);
  // body(k, t, live, G) for this lane's tokens, row after row.
  const auto each = [&](auto &&body) {
    const int64_t end = members.starts[g + 1];
    for (int64_t m = members.starts[g]; m < end; m += 32) {
      // Each lane looks up one of the next rows, so that these loads wait for each other once in 32 rows.
      const int count = int(min(end - m, int64_t(32)));
      const int64_t r = members.rows[m + min(lane_id(), count - 1)];
      const Span mine = span_of(b.rows, r);
      const A reward = b.per_row ? A(load(static_cast<const T *>(b.rewards)[r])) : A(0);
#pragma unroll 4
      for (int l = 0; l < count; ++l) {
        const Span row = from_lane(mine, l);
        const A all = from_lane(reward, l);
#pragma unroll
        for (int k = 0; k < own; ++k) {
          const int64_t t = row.begin + from + 32 * k;
          if (t >= row.end)
            continue;
          const bool live = !b.rows.mask || b.rows.mask[t];
          body(k, t, live, !live ? A(0) : b.per_row ? all : advantages[t]);
        }
      }
    }
  };
  double weighted[own] = {}, weight[own] = {};
  int64_t rows[own] = {};
  each([&](int k, int64_t t, bool live, A to_go) {
    if (!live)
      return;
    weighted[k] += double(energy[t]) * double(to_go);
    weight[k] += double(energy[t]);
    ++rows[k];
  });
  A baseline[own];
#pragma unroll
  for (int k = 0; k < own; ++k)
    baseline[k] = rows[k] > 1 ? A(weighted[k] / (weight[k] + b.epsilon)) : A(0);
  each([&](int k, int64_t t, bool live, A to_go) {
    advantages[t] = live ? to_go - baseline[k] : A(0);
    if (returns)
      returns[t] = to_go;
  });
}

template <class A> __global__ void __launch_bounds__(block_threads) clear_padding(Baseline b, int64_t tiles) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const int64_t from = place * tile_size;
  each_piece<false>(
      b.rows, from, min(from + tile_size, b.rows.size), [](int64_t, int64_t, int64_t, bool, bool) {},
      [&](int64_t first, int64_t last) {
        for (void *y : {b.advantages, b.returns})
          if (y)
            fill_zero(static_cast<A *>(y), first, last);
      });
}

Members members_of(const Baseline &b, Queue &queue) {
  const int64_t R = b.rows.count;
  check_fits(op, "rows", R);
  check_fits(op, "groups", b.groups);
  uint32_t *keys = queue.allocate_array<uint32_t>(R), *rows = queue.allocate_array<uint32_t>(R);
  launch(op, queue, make_keys, ceil_div(R, block_threads), block_threads, b, keys, rows);
  const auto sorted = sort_pairs<uint32_t, uint32_t>(op, queue, keys, rows, R, bits_of(uint64_t(b.groups)));
  return {sorted.values, starts_of(op, queue, sorted.keys, R, b.groups)};
}

const int64_t *stretches_of(const Baseline &b, const Members &members, Queue &queue) {
  int64_t *counts = queue.allocate_array<int64_t>(b.groups), *upto = queue.allocate_array<int64_t>(b.groups);
  launch(op, queue, count_stretches, ceil_div(b.groups, warps_per_block), block_threads, b, members, counts);
  size_t bytes = 0;
  const auto sum = [&](void *scratch) {
    check(cub::DeviceScan::InclusiveSum(scratch, bytes, counts, upto, b.groups, stream_of(queue)), op);
  };
  sum(nullptr);
  sum(queue.allocate(int64_t(bytes)));
  return upto;
}

} // namespace

void baseline(const Baseline &b, Queue &queue) {
  if (b.groups < 1)
    throw std::invalid_argument("baseline: groups: expected at least 1, got " + std::to_string(b.groups));
  with_float(b.type, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = accumulate_t<T>;
    const int64_t N = b.rows.size;
    A *own_energies = queue.allocate_array<A>(N), *energies = queue.allocate_array<A>(N);
    A *last = queue.allocate_array<A>(b.rows.count);
    launch(op, queue, find_energies<T>, ceil_div(N, block_threads), block_threads, b, own_energies);
    const Type sums = b.type == Type::f64 ? Type::f64 : Type::f32;
    scan({b.rows, sums, own_energies, nullptr, energies, last, 1, false, false}, queue);
    if (!b.per_row)
      scan({b.rows, b.type, b.rewards, nullptr, b.advantages, last, 1, true, false}, queue);
    const Members members = members_of(b, queue);
    const int64_t *upto = stretches_of(b, members, queue);
    // A group has at most one stretch that its longest row does not fill.
    launch(op, queue, write_advantages<T>, ceil_div(N / stretch + b.groups, warps_per_block), block_threads,
           b, members, upto, static_cast<const A *>(energies));
    const int64_t tiles = tiles_of(N);
    launch(op, queue, clear_padding<A>, ceil_div(tiles, warps_per_block), block_threads, b, tiles);
  });
}

} // namespace tokcredit::cuda
