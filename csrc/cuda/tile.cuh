// Warps over tiles of flat buffers: the pieces of rows inside a tile, and four tokens at a time.
#pragma once
#include "cuda/launch.cuh"
#include "math/tile.hpp"
#include "ops/array.hpp"

namespace tokcredit::cuda {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warps_per_block = 8;
constexpr int block_threads = 32 * warps_per_block;

__device__ inline int lane_id() { return int(threadIdx.x % 32); }

// Where a row lies; inside the buffer, whatever the arrays say. To look at them before a launch would mean to
// wait for the device, so kernels see to it that they touch nothing outside of a tensor.
struct Span {
  int64_t begin, end;
  __device__ int64_t length() const { return end - begin; }
};
__device__ inline Span span_of(const Rows &rows, int64_t r) {
  const int64_t begin = min(max(rows.begin[r], int64_t(0)), rows.size);
  return {begin, min(max(rows.end[r], begin), rows.size)};
}

// The number of entries of a nondecreasing array that are at most `bound`; the whole warp looks, 32 entries
// at once.
__device__ inline int64_t count_at_most(const int64_t *sorted, int64_t size, int64_t bound) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t width = (high - low + 31) / 32;
    const int64_t probe = low + (lane_id() + 1) * width - 1;
    const bool below = probe < high && sorted[probe] <= bound;
    low += __popc(__ballot_sync(all_lanes, below)) * width;
    high = min(high, low + width - 1);
  }
  return min(low, size);
}

// Calls piece(row, first, last, starts, ends) for each row that has tokens in [from, to), and gap(first,
// last) for the padding between them; backward from the tile's end if `reverse`. `starts` and `ends` say
// whether the row does, in walking order, inside the tile.
template <bool reverse, class Piece, class Gap>
__device__ void each_piece(const Rows &rows, int64_t from, int64_t to, Piece &&piece, Gap &&gap) {
  // Tiles lie inside the buffer, and rows are taken as if they did; see span_of.
  const bool at_begin = from == 0, at_end = to == rows.size;
  int64_t done = reverse ? to : from;
  int64_t r =
      reverse ? count_at_most(rows.begin, rows.count, to - 1) - 1 : count_at_most(rows.end, rows.count, from);
  for (; reverse ? r >= 0 : r < rows.count; r += reverse ? -1 : 1) {
    const int64_t begin = rows.begin[r], end = rows.end[r];
    if (reverse ? end <= from : begin >= to)
      break;
    const int64_t first = max(begin, from), last = min(end, to);
    if (first >= last)
      continue;
    reverse ? gap(last, done) : gap(done, first);
    const bool begins = begin >= from || at_begin, ends = end <= to || at_end;
    piece(r, first, last, reverse ? ends : begins, reverse ? begins : ends);
    done = reverse ? first : last;
  }
  reverse ? gap(from, done) : gap(done, to);
}

// Steps of a piece in walking order: body(t) gets the lane's first token, which may lie outside the piece.
template <bool reverse, class Body> __device__ void each_step(int64_t first, int64_t last, Body &&body) {
  const int64_t low = first / step_size, high = (last - 1) / step_size;
  for (int64_t k = 0; k <= high - low; ++k)
    body((reverse ? high - k : low + k) * step_size + quad * (reverse ? 31 - lane_id() : lane_id()));
}

template <class T> struct alignas(sizeof(T) * quad < 16 ? sizeof(T) * quad : 16) Quad {
  T item[quad];
};

// Tokens [t, t + 4) of a buffer of `size`; what lies beyond it is `T{}`.
template <class T> __device__ Quad<T> load_quad(const T *p, int64_t t, int64_t size, bool aligned) {
  if (aligned && t + quad <= size)
    return *reinterpret_cast<const Quad<T> *>(p + t);
  Quad<T> out{};
#pragma unroll
  for (int k = 0; k < quad; ++k)
    if (t + k < size)
      out.item[k] = p[t + k];
  return out;
}

// Sixteen bytes as one number: a struct of narrow items would be taken apart into narrow stores.
template <class T> __device__ void store_whole(T *p, const Quad<T> &x) {
  if constexpr (sizeof x % sizeof(uint4) == 0) {
    uint4 words[sizeof x / sizeof(uint4)];
    memcpy(words, &x, sizeof x);
#pragma unroll
    for (int i = 0; i < int(sizeof x / sizeof(uint4)); ++i)
      __stwb(reinterpret_cast<uint4 *>(p) + i, words[i]);
  } else {
    *reinterpret_cast<Quad<T> *>(p) = x;
  }
}

// Stores those of [t, t + 4) that lie in [first, last).
template <class T>
__device__ void store_quad(T *p, int64_t t, int64_t first, int64_t last, bool aligned, const Quad<T> &x) {
  if (aligned && t >= first && t + quad <= last) {
    store_whole(p + t, x);
    return;
  }
#pragma unroll
  for (int k = 0; k < quad; ++k)
    if (t + k >= first && t + k < last)
      p[t + k] = x.item[k];
}

// Which of the four tokens take part: inside [first, last) and not masked.
__device__ inline Quad<bool> live_quad(const Rows &rows, int64_t t, int64_t first, int64_t last) {
  Quad<bool> out{};
  if (t + quad <= first || t >= last)
    return out;
  if (rows.mask)
    out = load_quad(rows.mask, t, rows.size, quads_aligned(rows.mask));
#pragma unroll
  for (int k = 0; k < quad; ++k)
    out.item[k] = (!rows.mask || out.item[k]) && t + k >= first && t + k < last;
  return out;
}

// The lowest bit of each of four bytes, the first in the lowest bit.
__device__ inline unsigned low_bits(unsigned bytes) { return (bytes & 0x01010101u) * 0x10204080u >> 28; }

// Which tokens of the tile at `from` are set, four bits for each step of a lane; all where there is no mask.
__device__ inline unsigned tile_bits(const bool *mask, int64_t from, int64_t size) {
  constexpr int steps = int(tile_size / step_size);
  if (!mask)
    return ~0u;
  const int64_t own = from + quad * lane_id();
  unsigned bits = 0;
  if (quads_aligned(mask) && from + tile_size <= size) {
    const unsigned *words = reinterpret_cast<const unsigned *>(mask + own);
#pragma unroll
    for (int step = 0; step < steps; ++step)
      bits |= low_bits(words[step * 32]) << step * quad;
  } else {
    for (int k = 0; k < steps * quad; ++k) {
      const int64_t t = own + k / quad * step_size + k % quad;
      bits |= unsigned(t < size && mask[t]) << k;
    }
  }
  return bits;
}

template <class T> __device__ void fill_zero(T *y, int64_t first, int64_t last) {
  for (int64_t t = first + lane_id(); t < last; t += 32)
    y[t] = T{};
}

// Any struct of 4-byte multiples from another lane.
template <class S> __device__ S from_lane(const S &x, int lane) {
  static_assert(sizeof(S) % 4 == 0, "whole words");
  S out;
  int word;
#pragma unroll
  for (int i = 0; i < int(sizeof(S) / 4); ++i) {
    memcpy(&word, reinterpret_cast<const char *>(&x) + 4 * i, 4);
    word = __shfl_sync(all_lanes, word, lane);
    memcpy(reinterpret_cast<char *>(&out) + 4 * i, &word, 4);
  }
  return out;
}

// The merge of all lanes' parts in lane order, in lane 0.
template <class M> __device__ M merge_lanes(M m) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const M other = from_lane(m, lane_id() + step < 32 ? lane_id() + step : lane_id());
    if (lane_id() % (2 * step) == 0)
      m.merge(other);
  }
  return m;
}

} // namespace tokcredit::cuda
