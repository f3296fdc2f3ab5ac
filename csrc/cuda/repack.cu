// Each warp writes a tile of the target: the rows that lie there, from wherever they were, and zeros between.
// Types do not matter, so bytes are moved. Sixteen are stored at once; where the source lies at another
// distance from an address that allows it, they are cut out of two loads.
#include "cuda/tile.cuh"
#include "cuda/vector.cuh"
#include "ops/repack.hpp"

namespace tokcredit::cuda {
namespace {

constexpr int width = 16;
constexpr int64_t tile_bytes = 4096;

__device__ int misplaced(const uint8_t *p) { return int(reinterpret_cast<uintptr_t>(p) % width); }

__device__ uint4 load_whole(const uint8_t *from) { return *reinterpret_cast<const uint4 *>(from); }

// The sixteen bytes from `by` on, of the thirty-two at an aligned address.
__device__ uint4 cut_vector(const uint8_t *from, int by) {
  const Vector<uint64_t> one = load_vector(reinterpret_cast<const uint64_t *>(from)),
                         two = load_vector(reinterpret_cast<const uint64_t *>(from + width));
  const uint64_t first = by < 8 ? one.item[0] : one.item[1], second = by < 8 ? one.item[1] : two.item[0],
                 third = by < 8 ? two.item[0] : two.item[1];
  const int shift = by % 8 * 8;
  // Two shifts to the left: one by the whole width would be undefined.
  const uint64_t low = first >> shift | second << 1 << (63 - shift),
                 high = second >> shift | third << 1 << (63 - shift);
  return {unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)};
}

// y[first, last) by a warp: one(t) is a byte, and all(t) are those of [t, t + 16), if whole(t).
template <class One, class Whole, class All>
__device__ void write(uint8_t *y, int64_t first, int64_t last, One &&one, Whole &&whole, All &&all) {
  constexpr int step = 32 * width, flight = 4;
  int64_t body = min(last, first + (width - misplaced(y + first)) % width);
  int64_t end = body + (last - body) / width * width;
  if (body < end && !whole(body))
    body += width;
  if (body < end && !whole(end - width))
    end -= width;
  // On either side of the whole vectors are fewer bytes than lanes.
  if (first + lane_id() < body)
    y[first + lane_id()] = one(first + lane_id());
  const int size = int(end - body);
#pragma unroll 1 // four at once are enough
  for (int t = lane_id() * width; t < size; t += flight * step) {
    uint4 kept[flight]; // on their way together
#pragma unroll
    for (int u = 0; u < flight; ++u)
      if (t + u * step < size)
        kept[u] = all(body + t + u * step);
#pragma unroll
    for (int u = 0; u < flight; ++u)
      if (t + u * step < size)
        __stwb(reinterpret_cast<uint4 *>(y + body + t + u * step), kept[u]);
  }
  if (end + lane_id() < last)
    y[end + lane_id()] = one(end + lane_id());
}

__device__ void zero(uint8_t *y, int64_t first, int64_t last) {
  write(
      y, first, last, [](int64_t) { return uint8_t(0); }, [](int64_t) { return true; },
      [](int64_t) { return uint4{}; });
}

// y[t] = x[t + moved] for t in [first, last); x has `size` bytes.
__device__ void copy(uint8_t *y, int64_t first, int64_t last, const uint8_t *x, int64_t size, int64_t moved) {
  const auto one = [&](int64_t t) { return x[t + moved]; };
  // The same for all vectors, which are sixteen bytes apart in y.
  const int by = misplaced(x + first + moved + (width - misplaced(y + first)));
  if (by == 0)
    write(
        y, first, last, one, [](int64_t) { return true; },
        [&](int64_t t) { return load_whole(x + t + moved); });
  else
    write(
        y, first, last, one,
        [&](int64_t t) { return t + moved - by >= 0 && t + moved - by + 2 * width <= size; },
        [&](int64_t t) { return cut_vector(x + t + moved - by, by); });
}

__global__ void __launch_bounds__(block_threads, 3) repack_tiles(Repack p, int64_t bytes, int64_t tiles) {
  const auto *x = static_cast<const uint8_t *>(p.x);
  auto *y = static_cast<uint8_t *>(p.y);
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const int64_t tile = tile_bytes / bytes, low = place * tile, high = min(low + tile, p.size);
  int64_t done = low;
  // From the last row that begins before the tile or with it.
  for (int64_t r = max(count_at_most(p.to, p.rows, low) - 1, int64_t(0)); r < p.rows && p.to[r] < high; ++r) {
    const int64_t to = max(p.to[r], int64_t(0)), length = min(max(p.length[r], int64_t(0)), p.size - to);
    const int64_t moved = min(max(p.from[r], -p.size), p.source) - to;
    // Inside the tile and inside the source.
    const int64_t first = max(max(to, done), -moved), last = min(min(to + length, high), p.source - moved);
    if (first >= last)
      continue;
    zero(y, done * bytes, first * bytes);
    copy(y, first * bytes, last * bytes, x, p.source * bytes, moved * bytes);
    done = last;
  }
  zero(y, done * bytes, high * bytes);
}

} // namespace

void repack(const Repack &p, Queue &queue) {
  const int64_t bytes = bytes_of(p.type), tiles = ceil_div(p.size * bytes, tile_bytes);
  launch("repack", queue, repack_tiles, ceil_div(tiles, warps_per_block), block_threads, p, bytes, tiles);
}

} // namespace tokcredit::cuda
