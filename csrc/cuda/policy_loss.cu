// One pass: each warp evaluates the pieces of rows in its tile. Where a token's ratio or window depends on
// the tokens before it, a row that came in from another tile waits for its sums there; sums over a row that
// meets several tiles are merged in order by a second, small kernel.
#include "cuda/policy_loss_piece.cuh"
#include "cuda/policy_loss_running.cuh"
#include "math/dispatch.hpp"

namespace tokcredit::cuda {
namespace {

// `sums` has room for the log-ratios of a tile.
template <Surrogate kind, class T, Steps steps>
__device__ void tile(const PolicyLoss &p, const Call<accumulate_t<T>> &call, int64_t place, Stats *parts,
                     const Chain<Running> *chain, Staged<accumulate_t<T>> *sums) {
  using A = accumulate_t<T>;
  constexpr bool running = steps == Steps::running;
  A *slopes = static_cast<A *>(p.slopes);
  const int64_t from = place * tile_size, to = min(from + tile_size, p.rows.size);
  const Taking taking(p, from);
  bool published = false;
  // Backward where tiles wait for each other: the row that begins here and goes on comes first, because the
  // next tile waits for its sums, and they wait for nothing.
  each_piece<running>(
      p.rows, from, to,
      [&](int64_t r, int64_t first, int64_t last, bool entered, bool left) {
        const bool begins = running ? left : entered, ends = running ? entered : left;
        Piece<kind, T, steps> piece(p, call, taking, r, from, int(first - from), int(last - from));
        Tally tally;
        if constexpr (running) {
          const Differences<T> differences(p, call, taking, piece.plain, from, piece.first, piece.last);
          Running own{differences.total, 0};
          if (p.power != 0)
            own.position = sum_lanes(unsigned(__popc(differences.live)));
          Running in;
          if (!ends)
            chain->publish(place, begins ? Chain<Running>::carry : Chain<Running>::total, own);
          if (!begins)
            in = chain->arriving(place);
          if (!begins && !ends)
            chain->publish(place, Chain<Running>::carry, in.then(own));
          published |= !ends;
          piece.position = in.position;
          if (p.source == Source::cumulative) {
            A upto[own_tokens];
            differences.sums(in.log_ratio, upto);
            piece.sums = sums;
            piece.take_sums(upto, differences.usual, tally);
          }
        }
        piece.evaluate(tally);
        const bool whole = begins && ends;
        double *to = whole ? p.stats + r * loss_stats : parts[part_of(place, !begins)].sum;
        const double stat = tally.total();
        if (lane_id() < loss_stats)
          to[lane_id()] = stat;
        if (whole && lane_id() == int(LossStat::loss))
          static_cast<A *>(p.values)[r] = A(stat);
      },
      [&](int64_t first, int64_t last) {
        if (slopes)
          fill_zero(slopes, first, last);
      });
  // Spans that overlap or are in no order may make the next tile wait for a row that did not come by here.
  if constexpr (running)
    if (!published)
      chain->publish(place, Chain<Running>::carry, Running{});
}

// Blocks per multiprocessor: as many as what a token needs leaves registers for.
template <Surrogate kind, class T, Steps steps>
constexpr int resident =
    sizeof(T) == 8            ? 1
    : steps == Steps::running ? (kind == Surrogate::k1 || kind == Surrogate::soft ? 1 : 2)
    : kind == Surrogate::clip && steps != Steps::operands ? 4
                                                          : 3;

template <Surrogate kind, class T, bool rowwise>
__global__ void __launch_bounds__(block_threads,
                                  resident<kind, T, rowwise ? Steps::log_probs : Steps::operands>)
    policy_loss_tiles(PolicyLoss p, Call<accumulate_t<T>> call, int64_t tiles, Stats *parts) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place < tiles)
    tile<kind, T, rowwise ? Steps::log_probs : Steps::operands>(p, call, place, parts, nullptr, nullptr);
}

// Of rows whose tokens have the same log-ratio: no other policy to compare with, or one number per row.
template <class T>
__global__ void __launch_bounds__(block_threads, resident<Surrogate::clip, T, Steps::alike>)
    policy_loss_alike(PolicyLoss p, Call<accumulate_t<T>> call, int64_t tiles, Stats *parts) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place < tiles)
    tile<Surrogate::clip, T, Steps::alike>(p, call, place, parts, nullptr, nullptr);
}

template <Surrogate kind, class T>
__global__ void __launch_bounds__(block_threads, resident<kind, T, Steps::running>)
    policy_loss_chained(PolicyLoss p, Call<accumulate_t<T>> call, int64_t tiles, Stats *parts,
                        Chain<Running> chain) {
  __shared__ Staged<accumulate_t<T>> sums[warps_per_block];
  const int64_t place = chain.turn() * warps_per_block + threadIdx.x / 32;
  if (place < tiles)
    tile<kind, T, Steps::running>(p, call, place, parts, &chain, sums + threadIdx.x / 32);
}

// The sums of rows that are not inside one tile, a warp per row.
template <class A>
__global__ void __launch_bounds__(block_threads) merge_parts(PolicyLoss p, const Stats *parts) {
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (r >= p.rows.count)
    return;
  const auto [begin, end] = span_of(p.rows, r);
  if (begin < end && in_one_tile(begin, end))
    return;
  Stats own{};
  if (begin < end) {
    const int64_t first = begin / tile_size, last = (end - 1) / tile_size;
    for (int64_t k = first + lane_id(); k <= last; k += 32)
      own.merge(parts[part_of(k, k > first)]);
  }
  own = merge_lanes(own);
  if (lane_id() == 0) {
    reinterpret_cast<Stats *>(p.stats)[r] = own;
    static_cast<A *>(p.values)[r] = A(own.sum[int(LossStat::loss)]);
  }
}

template <Surrogate kind, class T> void run(const PolicyLoss &p, Queue &queue) {
  const int64_t tiles = tiles_of(p.rows.size), blocks = ceil_div(tiles, warps_per_block);
  Stats *parts = queue.allocate_array<Stats>(2 * tiles);
  const Call<accumulate_t<T>> call(p, quads_aligned(static_cast<const T *>(p.log_probs)) &&
                                          quads_aligned(static_cast<const T *>(p.reference)));
  if (chained(p)) {
    const Chain<Running> chain("policy_loss", queue, tiles);
    launch("policy_loss", queue, policy_loss_chained<kind, T>, blocks, block_threads, p, call, tiles, parts,
           chain);
  } else {
    auto *kernel = call.rowwise ? policy_loss_tiles<kind, T, true> : policy_loss_tiles<kind, T, false>;
    if constexpr (kind == Surrogate::clip)
      if (call.rowwise && !call.different)
        kernel = policy_loss_alike<T>;
    launch("policy_loss", queue, kernel, blocks, block_threads, p, call, tiles, parts);
  }
  launch("policy_loss", queue, merge_parts<accumulate_t<T>>, ceil_div(p.rows.count, warps_per_block),
         block_threads, p, parts);
}

} // namespace

void policy_loss(const PolicyLoss &p, Queue &queue) {
  with_float(p.type, [&](auto t) {
    with_surrogate(p.surrogate,
                   [&](auto kind) { run<decltype(kind)::value, typename decltype(t)::type>(p, queue); });
  });
}

} // namespace tokcredit::cuda
