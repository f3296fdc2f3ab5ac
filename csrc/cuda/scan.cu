// One pass: each warp walks the pieces of rows in its tile; a row that came in from another tile waits for
// its state there. The second walk over such a piece reads what the first one left in cache.
#include "cuda/chain.cuh"
#include "math/dispatch.hpp"
#include "ops/scan.hpp"

namespace tokcredit::cuda {
namespace {

// state -> scale * state + shift. A state itself is kept as a shift, with scale 1.
struct Affine {
  double scale = 1, shift = 0;

  __device__ Affine then(const Affine &next) const {
    return {scale * next.scale, next.scale * shift + next.shift};
  }
};

// Walks tokens [first, last) of one row from `in`, and returns what comes out. `write` stores the states.
template <class T, bool reverse, bool write>
__device__ Affine walk(const Scan &s, int64_t first, int64_t last, Affine in) {
  using A = accumulate_t<T>;
  const T *x = static_cast<const T *>(s.x);
  A *y = static_cast<A *>(s.y);
  const bool read_aligned = quads_aligned(x), write_aligned = quads_aligned(y);
  each_step<reverse>(first, last, [&](int64_t t) {
    const Quad<bool> live = live_quad(s.rows, t, first, last);
    const bool any = live.item[0] | live.item[1] | live.item[2] | live.item[3];
    const Quad<T> values = any ? load_quad(x, t, s.rows.size, read_aligned) : Quad<T>{};
    Affine own;
#pragma unroll
    for (int i = 0; i < quad; ++i) {
      const int k = reverse ? quad - 1 - i : i;
      if (live.item[k])
        own = own.then({s.decay, double(load(values.item[k]))});
    }
    Affine upto = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const Affine before = from_lane(upto, lane_id() >= step ? lane_id() - step : lane_id());
      if (lane_id() >= step)
        upto = before.then(upto);
    }
    if constexpr (write) {
      Affine before = from_lane(upto, lane_id() ? lane_id() - 1 : 0);
      double state = lane_id() ? in.then(before).shift : in.shift;
      Quad<A> out{};
#pragma unroll
      for (int i = 0; i < quad; ++i) {
        const int k = reverse ? quad - 1 - i : i;
        if (!live.item[k])
          continue;
        const double old = state;
        state = s.decay * state + double(load(values.item[k]));
        out.item[k] = A(s.exclusive ? old : state);
      }
      store_quad(y, t, first, last, write_aligned, out);
    }
    in = in.then(from_lane(upto, 31));
  });
  return in;
}

template <class T, bool reverse>
__global__ void __launch_bounds__(block_threads, 3) scan_tiles(Scan s, int64_t tiles, Chain<Affine> chain) {
  using A = accumulate_t<T>;
  const A *carry_in = static_cast<const A *>(s.carry_in);
  A *carry_out = static_cast<A *>(s.carry_out), *y = static_cast<A *>(s.y);
  const auto initial = [&](int64_t r) { return Affine{1, carry_in ? double(carry_in[r]) : 0.0}; };
  // Rows without tokens are in no tile.
  for (int64_t r = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; r < s.rows.count;
       r += int64_t(gridDim.x) * blockDim.x)
    if (s.rows.begin[r] == s.rows.end[r])
      carry_out[r] = A(initial(r).shift);

  const int64_t place = chain.place();
  if (place >= tiles)
    return;
  const int64_t from = (reverse ? tiles - 1 - place : place) * tile_size;
  const int64_t to = min(from + tile_size, s.rows.size);
  each_piece<reverse>(
      s.rows, from, to,
      [&](int64_t r, int64_t first, int64_t last, bool starts, bool ends) {
        Affine in = starts ? initial(r) : Affine{};
        if (!starts && !ends) {
          const Affine total = walk<T, reverse, false>(s, first, last, in);
          chain.publish(place, Chain<Affine>::total, total);
          in = chain.arriving(place);
          chain.publish(place, Chain<Affine>::carry, in.then(total));
        } else if (!starts) {
          in = chain.arriving(place);
        }
        const Affine out = walk<T, reverse, true>(s, first, last, in);
        if (starts && !ends)
          chain.publish(place, Chain<Affine>::carry, out);
        if (ends && lane_id() == 0)
          carry_out[r] = A(out.shift);
      },
      [&](int64_t first, int64_t last) { fill_zero(y, first, last); });
}

} // namespace

void scan(const Scan &s, Queue &queue) {
  with_float(s.type, [&](auto t) {
    using T = typename decltype(t)::type;
    const int64_t tiles = tiles_of(s.rows.size);
    const Chain<Affine> chain("scan", queue, tiles);
    launch("scan", queue, s.reverse ? scan_tiles<T, true> : scan_tiles<T, false>,
           ceil_div(tiles > 0 ? tiles : 1, warps_per_block), block_threads, s, tiles, chain);
  });
}

} // namespace tokcredit::cuda
