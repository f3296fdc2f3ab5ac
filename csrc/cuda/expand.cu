// Run-length decoding: each warp writes a tile of the buffer. For every row that has tokens there it walks
// the leaf's path, as far as the tile reaches, and writes each run with stores of 16 bytes. Tiles have one
// size, so a long row among short ones keeps no warp longer than the others.
#include "cuda/tile.cuh"
#include "cuda/vector.cuh"
#include "ops/tree.hpp"

namespace tokcredit::cuda {
namespace {

template <class T> __device__ T plus(T a, T b) { return a + b; }
template <> __device__ bool plus(bool a, bool b) { return a || b; }

// The mask of a vector, as one number.
template <class T>
using Flags =
    std::conditional_t<sizeof(T) == 1, uint4, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

// Stores `value` where the mask is true, else 0.
template <class T> __device__ void store_masked(T *y, Flags<T> kept, T value) {
  if constexpr (std::is_same_v<T, bool>) { // and `value` is true
    __stwb(reinterpret_cast<uint4 *>(y), kept);
  } else {
    Vector<T> out;
#pragma unroll
    for (int k = 0; k < Vector<T>::width; ++k)
      out.item[k] = kept >> 8 * k & 0xff ? value : T{};
    store_vector(y, out);
  }
}

// y[first, last) = value, 0 where masked; by a warp.
template <class T> __device__ void fill(T *y, const bool *mask, int64_t first, int64_t last, T value) {
  constexpr int width = Vector<T>::width, step = 32 * width, flight = 4;
  if (std::is_same_v<T, bool> && !value)
    mask = nullptr; // false everywhere
  // Up to the first aligned address, then whole vectors, then what is left.
  const int misplaced = int(reinterpret_cast<uintptr_t>(y + first) % 16 / sizeof(T));
  int64_t body = min(last, first + (width - misplaced) % width);
  if (mask && reinterpret_cast<uintptr_t>(mask + body) % width != 0)
    body = last;
  const int size = int((last - body) / width * width);
  const auto each_single = [&](int64_t from, int64_t to) {
#pragma unroll 1 // few
    for (int64_t t = from + lane_id(); t < to; t += 32)
      y[t] = !mask || mask[t] ? value : T{};
  };
  each_single(first, body);
  if (mask) {
    // Flags of four vectors are on their way together.
    for (int t = lane_id() * width; t < size; t += flight * step) {
      Flags<T> kept[flight];
#pragma unroll
      for (int u = 0; u < flight; ++u)
        if (t + u * step < size)
          kept[u] = *reinterpret_cast<const Flags<T> *>(mask + body + t + u * step);
#pragma unroll
      for (int u = 0; u < flight; ++u)
        if (t + u * step < size)
          store_masked(y + body + t + u * step, kept[u], value);
    }
  } else {
    Vector<T> all;
#pragma unroll
    for (int k = 0; k < width; ++k)
      all.item[k] = value;
#pragma unroll 4
    for (int t = lane_id() * width; t < size; t += step)
      store_vector(y + body + t, all);
  }
  each_single(body + size, last);
}

template <class T>
__global__ void __launch_bounds__(block_threads) expand_tiles(Expand e, int64_t tile, int64_t tiles) {
  const T *row = static_cast<const T *>(e.row), *body = static_cast<const T *>(e.body),
          *head = static_cast<const T *>(e.head);
  T *y = static_cast<T *>(e.y);
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const bool *mask = e.rows.mask;
  each_piece<false>(
      e.rows, place * tile, min((place + 1) * tile, e.rows.size),
      [&](int64_t r, int64_t low, int64_t high, bool, bool) {
        const T base = row ? row[r] : T{};
        if (!e.leaf)
          return fill(y, mask, low, high, base);
        const auto [begin, end] = span_of(e.rows, r);
        int64_t last = end;
        for (int64_t v = e.leaf[r]; v >= 0 && v < e.nodes && last > low; v = e.parent[v]) {
          const int64_t first = begin + max(e.depth[v], int64_t(0));
          if (first >= last) // no tree: a node begins before its children
            break;
          if (first < high) {
            const T value = body ? plus(base, body[v]) : base;
            const int64_t rest = max(low, first + (head != nullptr));
            if (rest > first && first >= low && lane_id() == 0)
              y[first] = !mask || mask[first] ? plus(value, head[v]) : T{};
            fill(y, mask, rest, min(last, high), value);
          }
          last = first;
        }
      },
      [&](int64_t first, int64_t last) { fill<T>(y, nullptr, first, last, T{}); });
}

template <class T> void expand_as(const Expand &e, Queue &queue) {
  // Long tiles search for their rows less often; short ones keep a whole device busy.
  int64_t tile = tile_size;
  while (tile * int64_t(sizeof(T)) < 16384 && e.rows.size / tile > 8192)
    tile *= 2;
  const int64_t tiles = ceil_div(e.rows.size, tile);
  launch("expand", queue, expand_tiles<T>, ceil_div(tiles, warps_per_block), block_threads, e, tile, tiles);
}

} // namespace

void expand(const Expand &e, Queue &queue) {
  switch (e.type) {
  case Type::f64:
    return expand_as<double>(e, queue);
  case Type::i64:
    return expand_as<int64_t>(e, queue);
  case Type::b8:
    return expand_as<bool>(e, queue);
  default:
    return expand_as<float>(e, queue);
  }
}

} // namespace tokcredit::cuda
