// How flat buffers are cut into tiles, one per warp, and where a row's part of a tile is kept. Cuts depend on
// positions only, so the order of every sum is fixed.
#pragma once
#include "math/number.hpp"

namespace tokcredit {

constexpr int quad = 4;                  // tokens that a lane reads at once: 16 bytes of float32
constexpr int64_t step_size = 32 * quad; // tokens that a warp reads at once
constexpr int64_t tile_size = 4 * step_size;

TOKCREDIT_FN int64_t tiles_of(int64_t size) { return (size + tile_size - 1) / tile_size; }

// A row that is not inside one tile leaves a part in every tile it meets. A tile holds at most two such rows:
// one that began before it (and may go on after it), and one that begins in it and goes on.
TOKCREDIT_FN int64_t part_of(int64_t tile, bool began_before) { return 2 * tile + (began_before ? 0 : 1); }

TOKCREDIT_FN bool in_one_tile(int64_t begin, int64_t end) {
  return begin >= end || begin / tile_size == (end - 1) / tile_size;
}

// Whether a pointer allows loads of four elements at every multiple of four: 16 bytes, or all four of a
// narrower type.
template <class T> TOKCREDIT_FN bool quads_aligned(const T *p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * quad < 16 ? sizeof(T) * quad : 16) == 0;
}

} // namespace tokcredit
