// One pass. A warp holds a tile in registers, sixteen tokens per lane; lanes, warps and blocks hand on what
// their tokens do to a state. A row that came in from another block waits for its state there.
#include "cuda/chain.cuh"
#include "cuda/lane.cuh"
#include "math/dispatch.hpp"
#include "ops/scan.hpp"

namespace tokcredit::cuda {
namespace {

// state -> scale * state + shift. A state itself is kept as a shift, with scale 1.
struct Affine {
  double scale, shift;

  __device__ Affine then(const Affine &next) const {
    return {scale * next.scale, next.scale * shift + next.shift};
  }
};

constexpr Affine identity{1, 0};

// What a warp's tile does to the row that goes on after it. Where a row begins in it, the state before does
// not matter.
struct Total {
  Affine affine;
  bool begins;

  __device__ Total then(const Total &next) const {
    return next.begins ? next : Total{affine.then(next.affine), begins};
  }
};

// The tokens of a lane in walking order, from the k-th of sixteen to the next.
template <bool reverse> __device__ constexpr int walked(int k) { return reverse ? own_tokens - 1 - k : k; }

// Runs over the lane's tokens from `state`, and calls put(k, state before, state after) for each. With
// `plain` all of them are live and no row begins; else `begins` and `live` are bits, and start(k, state,
// decay) sets what the row that begins at token k has.
template <bool reverse, bool plain, class T, class Start, class Put>
__device__ double walk(const Own<T> &x, double decay, double state, unsigned live, unsigned begins,
                       Start &&start, Put &&put) {
#pragma unroll
  for (int i = 0; i < own_tokens; ++i) {
    const int k = walked<reverse>(i);
    if (!plain && begins >> k & 1)
      start(k, state, decay);
    const double before = state;
    if (plain || live >> k & 1)
      state = decay * state + double(load(x[k]));
    put(k, before, state);
  }
  return state;
}

// The affine maps of all lanes up to and including each. A lane looks back over `reach` lanes: not beyond one
// in which a row begins.
__device__ inline Affine scan_lanes(Affine upto, int reach) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Affine before = from_lane(upto, max(lane_id() - step, 0));
    if (step <= reach)
      upto = before.then(upto);
  }
  return upto;
}

// The row of a token, or one nearby where it lies in none.
__device__ inline int64_t row_of(const Rows &rows, int64_t t) {
  int64_t low = 0, high = rows.count - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    rows.end[middle] <= t ? low = middle + 1 : high = middle;
  }
  return low;
}

// Blocks per multiprocessor for which registers are left.
template <class T> constexpr int resident = sizeof(T) == 8 ? 2 : 3;

template <class T, bool reverse>
__global__ void __launch_bounds__(block_threads, resident<T>)
    scan_tiles(Scan s, int64_t tiles, Chain<Affine> chain) {
  using A = accumulate_t<T>;
  __shared__ Staged<A> staging[warps_per_block];
  __shared__ Borders all_borders[warps_per_block];
  __shared__ Total totals[warps_per_block];
  __shared__ double arrived;
  const A *carry_in = static_cast<const A *>(s.carry_in);
  A *carry_out = static_cast<A *>(s.carry_out);
  const auto initial = [&](int64_t r) { return carry_in ? double(carry_in[r]) : 0.0; };
  // Rows without tokens are in no tile.
  for (int64_t r = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; r < s.rows.count;
       r += int64_t(gridDim.x) * blockDim.x)
    if (s.rows.begin[r] == s.rows.end[r])
      carry_out[r] = A(initial(r));

  const int64_t turn = chain.turn();
  const int warp = int(threadIdx.x / 32);
  const int64_t place = turn * warps_per_block + warp; // of the tile, in walking order
  const int64_t from = (reverse ? tiles - 1 - place : place) * tile_size;
  const int size = place < tiles ? int(min(tile_size, s.rows.size - from)) : 0;
  const int block = reverse ? 31 - lane_id() : lane_id(); // of sixteen tokens
  const int64_t own_from = from + block * own_tokens;
  Staged<A> &staged = staging[warp];
  Borders &borders = all_borders[warp];
  // The number of a row waits where the lane that needs it will later put a result.
  const auto row_at = [&](int token) -> int & { return reinterpret_cast<int &>(staged.at(token)); };

  Own<T> x{};
  unsigned inside = 0, live = 0, begins = 0, ends = 0;
  if (size > 0) {
    const unsigned unmasked = load_own(static_cast<const T *>(s.x), s.rows.mask, own_from, s.rows.size, x);
    find_borders(s.rows, from, from + size, borders, row_at);
    inside = Borders::own(borders.inside, block);
    live = inside & unmasked;
    begins = Borders::own(reverse ? borders.last : borders.first, block);
    ends = Borders::own(reverse ? borders.first : borders.last, block);
  }
  const bool plain = __all_sync(all_lanes, live == own_all && (begins | ends) == 0);
  const auto begun = [&](int k, double &state, double &decay) {
    const int64_t r = borders.first_row + row_at(block * own_tokens + k);
    state = initial(r);
    if (s.decays)
      decay = s.decays[r];
  };
  const auto nothing = [](int, double, double) {};

  // What the lane's tokens do, as far as a row that comes in is concerned.
  const bool by_row = s.decays && inside;
  const double decay = by_row ? s.decays[row_of(s.rows, own_from + walked<reverse>(0))] : s.decay;
  Affine own = identity;
  if (plain) {
    own.shift = walk<reverse, true>(x, decay, 0, live, begins, begun, nothing);
    own.scale = decay;
#pragma unroll
    for (int power = 1; power < own_tokens; power *= 2)
      own.scale *= own.scale;
  } else {
    own.shift = walk<reverse, false>(x, decay, 0, live, begins, begun, nothing);
    for (int k = __popc(live); k > 0; --k)
      own.scale *= decay;
  }
  const unsigned beginning = __ballot_sync(all_lanes, begins != 0);
  const unsigned earlier = beginning & ((1u << lane_id()) - 1);
  const int nearest =
      begins ? lane_id() : 31 - __clz(int(earlier)); // lane in which a row begins, -1 for none
  const Affine upto = scan_lanes(own, lane_id() - max(nearest, 0));
  const Affine before = from_lane(upto, max(lane_id() - 1, 0));
  if (lane_id() == 31)
    totals[warp] = {upto, beginning != 0};
  __syncthreads();

  if (warp == 0) {
    Total all{identity, false};
#pragma unroll
    for (int w = 0; w < warps_per_block; ++w)
      all = all.then(totals[w]);
    const int64_t start =
        __ballot_sync(all_lanes, inside >> walked<reverse>(0) & 1 && !(begins >> walked<reverse>(0) & 1)) & 1;
    const bool comes_in = start && turn > 0;
    Affine in = identity;
    if (all.begins || !comes_in) {
      // The row that goes on began here: the next block waits for it, and it waits for nothing.
      chain.publish(turn, Chain<Affine>::carry, {1, all.affine.shift});
    } else {
      chain.publish(turn, Chain<Affine>::total, all.affine);
    }
    if (comes_in) {
      in = chain.arriving(turn);
      if (!all.begins)
        chain.publish(turn, Chain<Affine>::carry, {1, in.then(all.affine).shift});
    }
    if (lane_id() == 0)
      arrived = in.shift;
  }
  __syncthreads();
  if (size == 0)
    return;

  // The state after the block's tiles before this one.
  double at_warp = arrived;
#pragma unroll
  for (int w = 0; w < warps_per_block - 1; ++w)
    if (w < warp)
      at_warp = totals[w].begins ? totals[w].affine.shift
                                 : totals[w].affine.scale * at_warp + totals[w].affine.shift;
  double state = lane_id() == 0 ? at_warp : earlier ? before.shift : before.scale * at_warp + before.shift;
  A *out = staged.own(block);
  if (plain) {
    walk<reverse, true>(x, decay, state, live, begins, begun,
                        [&](int k, double old, double now) { out[k] = A(s.exclusive ? old : now); });
  } else {
    walk<reverse, false>(x, decay, state, live, begins, begun, [&](int k, double old, double now) {
      if (ends >> k & 1)
        carry_out[borders.first_row + row_at(block * own_tokens + k)] = A(now);
      out[k] = live >> k & 1 ? A(s.exclusive ? old : now) : A(0);
    });
  }
  __syncwarp();
  staged.store(static_cast<A *>(s.y), from, from + size);
}

} // namespace

void scan(const Scan &s, Queue &queue) {
  with_float(s.type, [&](auto t) {
    using T = typename decltype(t)::type;
    const int64_t tiles = tiles_of(s.rows.size), blocks = ceil_div(tiles > 0 ? tiles : 1, warps_per_block);
    const Chain<Affine> chain("scan", queue, blocks);
    launch("scan", queue, s.reverse ? scan_tiles<T, true> : scan_tiles<T, false>, blocks, block_threads, s,
           tiles, chain);
  });
}

} // namespace tokcredit::cuda
