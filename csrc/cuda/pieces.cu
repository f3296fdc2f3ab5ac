// A warp walks a row, a tile of it at once: sixteen marks per lane, as bits, and sums over the lanes before.
#include "cuda/lane.cuh"
#include "ops/pieces.hpp"

namespace tokcredit::cuda {
namespace {

// The sum of `x` over the lanes before this one, and over all.
template <class T> __device__ T sum_before(T x, T &all) {
  T sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_sync(all_lanes, sum, lane_id() >= step ? lane_id() - step : lane_id());
    sum += lane_id() >= step ? other : T(0);
  }
  all = __shfl_sync(all_lanes, sum, 31);
  return sum - x;
}

// Calls mark(token, k) for the k-th marked token of the row or, with `runs`, for the first token of its k-th
// run, and over(token, k) for the first token after the k-th run. Returns how many there are.
template <class Mark, class Over>
__device__ int64_t walk(const Rows &rows, Cut cut, int64_t r, Mark &&mark, Over &&over) {
  const auto [begin, end] = span_of(rows, r);
  const bool runs = cut == Cut::runs;
  int64_t count = 0;
  unsigned last = 0; // whether the token before the tile is marked
  for (int64_t from = begin / own_tokens * own_tokens; from < end; from += tile_size) {
    const int64_t own = from + lane_id() * own_tokens;
    const unsigned inside =
        bits_between(int(max(begin - from, int64_t(0))), int(min(end - from, int64_t(tile_size))));
    const unsigned marked = load_bits(rows.mask, own, rows.size) & inside;
    const unsigned neighbour = __shfl_sync(all_lanes, marked >> (own_tokens - 1), (lane_id() + 31) % 32);
    const unsigned shifted = marked << 1 | (lane_id() == 0 ? last : neighbour);
    last = __shfl_sync(all_lanes, marked >> (own_tokens - 1), 31);
    unsigned first = runs ? marked & ~shifted : marked;
    int all;
    int64_t k = count + sum_before(__popc(first), all);
    if (runs)
      for (unsigned ended = ~marked & shifted & own_all; ended; ended &= ended - 1) {
        const int i = __ffs(int(ended)) - 1;
        over(own + i, k + __popc(first & ((1u << i) - 1)) - 1);
      }
    for (; first; first &= first - 1)
      mark(own + __ffs(int(first)) - 1, k++);
    count += all;
  }
  if (runs && last && lane_id() == 0) // the last run ends with the row and the tile
    over(end, count - 1);
  return count;
}

// Counts, which add_up makes offsets.
__global__ void __launch_bounds__(block_threads) count_pieces(PieceOffsets p) {
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (r >= p.rows.count)
    return;
  const auto nothing = [](int64_t, int64_t) {};
  const int64_t count = walk(p.rows, p.cut, r, nothing, nothing);
  if (lane_id() == 0)
    p.offset[r] = count + (p.cut != Cut::runs);
}

// By one warp: there are only as many as rows.
__global__ void add_up(PieceOffsets p) {
  int64_t sum = 0;
  for (int64_t base = 0; base < p.rows.count; base += 32) {
    const int64_t r = base + lane_id(), own = r < p.rows.count ? p.offset[r] : 0;
    int64_t all;
    const int64_t before = sum_before(own, all);
    if (r < p.rows.count)
      p.offset[r] = sum + before;
    sum += all;
  }
  if (lane_id() == 0)
    p.offset[p.rows.count] = sum;
}

__global__ void __launch_bounds__(block_threads) write_pieces(Pieces p) {
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (r >= p.rows.count)
    return;
  const auto put = [&](int64_t *to, int64_t k, int64_t value) {
    const int64_t i = p.offset[r] + k;
    if (i >= 0 && i < p.count)
      to[i] = value;
  };
  const auto [begin, end] = span_of(p.rows, r);
  const bool after = p.cut == Cut::after, runs = p.cut == Cut::runs;
  const int64_t marks = walk(
      p.rows, p.cut, r,
      [&](int64_t token, int64_t k) {
        const int64_t border = after ? token + 1 : token, own = k + (p.cut == Cut::before);
        put(p.at, own, token);
        put(p.row, own, r);
        if (!runs)
          put(p.end, k, border);
        put(p.begin, runs ? k : k + 1, border);
      },
      [&](int64_t token, int64_t k) { put(p.end, k, token); });
  if (runs || lane_id() != 0)
    return;
  // The piece without a mark.
  put(p.at, after ? marks : 0, -1);
  put(p.row, after ? marks : 0, r);
  put(p.begin, 0, begin);
  put(p.end, marks, end);
}

} // namespace

void piece_offsets(const PieceOffsets &p, Queue &queue) {
  launch("pieces", queue, count_pieces, ceil_div(p.rows.count, warps_per_block), block_threads, p);
  launch("pieces", queue, add_up, 1, 32, p);
}

void pieces(const Pieces &p, Queue &queue) {
  launch("pieces", queue, write_pieces, ceil_div(p.rows.count, warps_per_block), block_threads, p);
}

} // namespace tokcredit::cuda
