// A tile in registers: sixteen neighbouring tokens per lane, all on their way from memory together, and which
// of them begin and end rows, as bits.
#pragma once
#include "cuda/tile.cuh"
#include <type_traits>

namespace tokcredit::cuda {

constexpr int own_tokens = 16;
constexpr unsigned own_all = (1u << own_tokens) - 1;
static_assert(tile_size == 32 * own_tokens, "a tile is what a warp holds");

// Half precision stays in pairs, as it is loaded: apart, each would take a register, and an instruction more.
template <class T> struct Own {
  static constexpr int in_word = sizeof(T) == 2 ? 2 : 1;
  using Word = std::conditional_t<sizeof(T) == 2, uint32_t, T>;
  Word word[own_tokens / in_word];

  __device__ T operator[](int k) const {
    if constexpr (in_word == 2)
      return {uint16_t(word[k / 2] >> k % 2 * 16)};
    else
      return word[k];
  }
  __device__ void set(int k, T x) {
    if constexpr (in_word == 2)
      word[k / 2] |= uint32_t(x.bits) << k % 2 * 16; // 0 before
    else
      word[k] = x;
  }
};

// Which of sixteen bytes are true, the first in the lowest bit.
__device__ inline unsigned true_bits(uint4 bytes) {
  return low_bits(bytes.x) | low_bits(bytes.y) << 4 | low_bits(bytes.z) << 8 | low_bits(bytes.w) << 12;
}

// Those of a lane's tokens [t, t + 16) that are not masked; none beyond `size`.
__device__ inline unsigned load_bits(const bool *mask, int64_t t, int64_t size) {
  const bool whole = t + own_tokens <= size;
  if (whole && !mask)
    return own_all;
  if (whole && reinterpret_cast<uintptr_t>(mask) % 16 == 0)
    return true_bits(*reinterpret_cast<const uint4 *>(mask + t));
  unsigned bits = 0;
#pragma unroll 1 // rare, and all at once would take registers from what is not
  for (int k = 0; k < own_tokens; ++k)
    bits |= unsigned(t + k < size && (!mask || mask[t + k])) << k;
  return bits;
}

// Loads a lane's tokens [t, t + 16) of a buffer of `size`, and returns which of them are not masked. What
// lies beyond the buffer is `T{}`. Tokens and mask are on their way together.
template <class T>
__device__ unsigned load_own(const T *p, const bool *mask, int64_t t, int64_t size, Own<T> &own) {
  constexpr int words = sizeof own / 16;
  if ((reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(mask)) % 16 == 0 &&
      t + own_tokens <= size) {
    uint4 load[words], bytes{~0u, ~0u, ~0u, ~0u};
#pragma unroll
    for (int v = 0; v < words; ++v)
      load[v] = reinterpret_cast<const uint4 *>(p + t)[v];
    if (mask)
      bytes = *reinterpret_cast<const uint4 *>(mask + t);
    memcpy(&own, load, sizeof own);
    return true_bits(bytes);
  }
  own = {};
#pragma unroll
  for (int k = 0; k < own_tokens; ++k)
    if (t + k < size)
      own.set(k, p[t + k]);
  return load_bits(mask, t, size);
}

// Which of a lane's sixteen lie in [first, last) of the tile.
__device__ inline unsigned bits_between(int first, int last) {
  const int own = lane_id() * own_tokens;
  const int low = min(max(first - own, 0), own_tokens), high = min(max(last - own, 0), own_tokens);
  return (1u << high) - (1u << low);
}

// Borders of rows inside a tile, kept in shared memory by a warp: a bit per token.
struct Borders {
  int64_t first_row;
  unsigned inside[tile_size / 32]; // of a row
  unsigned first[tile_size / 32];  // of its row
  unsigned last[tile_size / 32];

  // A lane's sixteen.
  static __device__ unsigned own(const unsigned *bits, int block) {
    return bits[block / 2] >> block % 2 * own_tokens & own_all;
  }
};

// Fills `borders` for the tile [from, to). `row_at(token)` is where the number of the row that begins or ends
// there is put, less that of the first row.
template <class RowAt>
__device__ void find_borders(const Rows &rows, int64_t from, int64_t to, Borders &borders, RowAt &&row_at) {
  if (lane_id() < tile_size / 32)
    borders.inside[lane_id()] = borders.first[lane_id()] = borders.last[lane_id()] = 0;
  __syncwarp();
  const int64_t low = count_at_most(rows.end, rows.count, from);
  for (int64_t base = low;; base += 32) {
    const int64_t r = base + lane_id();
    const bool here = r < rows.count && rows.begin[r] < to;
    const int64_t begin = here ? rows.begin[r] : to, end = here ? rows.end[r] : to;
    const int first = int(max(begin, from) - from), last = int(min(end, to) - from) - 1;
    if (here && first <= last) {
      const auto set = [](unsigned *bits, int token) { atomicOr(bits + token / 32, 1u << token % 32); };
      if (begin >= from) {
        set(borders.first, first);
        row_at(first) = int(r - low);
      }
      if (end <= to) {
        set(borders.last, last);
        row_at(last) = int(r - low);
      }
      for (int w = first / 32; w <= last / 32; ++w) {
        const unsigned from_first = w == first / 32 ? ~0u << first % 32 : ~0u;
        const unsigned to_last = w == last / 32 ? ~0u >> (31 - last % 32) : ~0u;
        atomicOr(borders.inside + w, from_first & to_last);
      }
    }
    if (__ballot_sync(all_lanes, here) >> 31 == 0)
      break;
  }
  if (lane_id() == 0)
    borders.first_row = low;
  __syncwarp();
}

// What the lanes of a warp write into shared memory, sixteen neighbours each, to be stored side by side. The
// gaps keep sixteen lanes that access 16 bytes each on different banks.
template <class A> struct Staged {
  static constexpr int stride = own_tokens + 16 / int(sizeof(A));
  alignas(16) A item[32 * stride];

  __device__ A *own(int block) { return item + block * stride; }
  __device__ A &at(int token) { return item[token / own_tokens * stride + token % own_tokens]; }

  // A lane's four of a step.
  __device__ Quad<A> quad_of(int step) const {
    constexpr int lanes = own_tokens / quad;
    const int own = lane_id() / lanes * stride + lane_id() % lanes * quad;
    Quad<A> four;
    memcpy(&four, item + own + step * (32 / lanes) * stride, sizeof four);
    return four;
  }

  // Stores those of the tile at `from` that lie before `to`; the warp must have met after it wrote them.
  __device__ void store(A *y, int64_t from, int64_t to) const {
    const bool aligned = quads_aligned(y);
#pragma unroll
    for (int step = 0; step < int(tile_size / step_size); ++step)
      store_quad(y, from + step * step_size + quad * lane_id(), from, to, aligned, quad_of(step));
  }
};

} // namespace tokcredit::cuda
