// Tokens times a factor of their row.
#include "cuda/tile.cuh"
#include "ops/policy_loss.hpp"

namespace tokcredit::cuda {
namespace {

template <class A> __global__ void __launch_bounds__(block_threads) scale_tiles(ScaleRows s, int64_t tiles) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const A *x = static_cast<const A *>(s.x);
  A *y = static_cast<A *>(s.y);
  const bool in_place = s.in_place();
  const int64_t from = place * tile_size, to = min(from + tile_size, s.rows.size);
  each_piece<false>(
      s.rows, from, to,
      [&](int64_t r, int64_t first, int64_t last, bool, bool) {
        const A factor = static_cast<const A *>(s.factor)[s.per_row ? r : 0];
        if (in_place && factor == A(1))
          return;
        each_step<false>(first, last, [&](int64_t t) {
          if (t + quad <= first || t >= last)
            return;
          Quad<A> values = load_quad(x, t, s.rows.size, quads_aligned(x));
#pragma unroll
          for (int k = 0; k < quad; ++k)
            values.item[k] = in_place && values.item[k] == A(0) ? values.item[k] : values.item[k] * factor;
          store_quad(y, t, first, last, quads_aligned(y), values);
        });
      },
      [&](int64_t first, int64_t last) {
        if (!in_place)
          fill_zero(y, first, last);
      });
}

} // namespace

void scale_rows(const ScaleRows &s, Queue &queue) {
  const int64_t tiles = tiles_of(s.rows.size), blocks = ceil_div(tiles, warps_per_block);
  const auto kernel = [&](auto a) {
    launch("scale_rows", queue, scale_tiles<decltype(a)>, blocks, block_threads, s, tiles);
  };
  s.type == Type::f64 ? kernel(double{}) : kernel(float{});
}

} // namespace tokcredit::cuda
