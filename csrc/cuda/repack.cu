// Each warp writes a tile of the target: the rows that lie there, from wherever they were, and zeros between.
#include "cuda/tile.cuh"
#include "ops/repack.hpp"

namespace tokcredit::cuda {
namespace {

__global__ void find_ends(Repack p, int64_t *end) {
  const int64_t r = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (r < p.rows)
    end[r] = p.to[r] + p.length[r];
}

template <class T>
__global__ void __launch_bounds__(block_threads) repack_tiles(Repack p, Rows target, int64_t tiles) {
  const T *x = static_cast<const T *>(p.x);
  T *y = static_cast<T *>(p.y);
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const int64_t from = place * tile_size, to = min(from + tile_size, p.size);
  each_piece<false>(
      target, from, to,
      [&](int64_t r, int64_t first, int64_t last, bool, bool) {
        const int64_t moved = p.from[r] - p.to[r];
#pragma unroll 4
        for (int64_t t = first + lane_id(); t < last; t += 32)
          y[t] = t + moved >= 0 && t + moved < p.source ? x[t + moved] : T{};
      },
      [&](int64_t first, int64_t last) { fill_zero(y, first, last); });
}

template <class T> void repack_as(const Repack &p, const Rows &target, Queue &queue) {
  const int64_t tiles = tiles_of(p.size);
  launch("repack", queue, repack_tiles<T>, ceil_div(tiles, warps_per_block), block_threads, p, target, tiles);
}

} // namespace

void repack(const Repack &p, Queue &queue) {
  int64_t *end = queue.allocate_array<int64_t>(p.rows);
  launch("repack", queue, find_ends, ceil_div(p.rows, block_threads), block_threads, p, end);
  const Rows target{p.to, end, nullptr, p.rows, p.size};
  switch (bytes_of(p.type)) {
  case 8:
    return repack_as<uint64_t>(p, target, queue);
  case 4:
    return repack_as<uint32_t>(p, target, queue);
  case 2:
    return repack_as<uint16_t>(p, target, queue);
  default:
    return repack_as<uint8_t>(p, target, queue);
  }
}

} // namespace tokcredit::cuda
