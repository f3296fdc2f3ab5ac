// One launch per step, one warp per token. The best candidate of a row and step is an integer, of which the
// largest is kept, so the choice does not depend on the order of the warps; how many tokens are compared
// does.
#include "cuda/tile.cuh"
#include "math/diverse.hpp"
#include <cuda/atomic>

namespace tokcredit::cuda {
namespace {

constexpr const char *op = "diverse";

struct State {
  unsigned long long *best; // [R, steps]
  int64_t *row;             // [N], -1 for a token that no longer competes
  float *score, *inverse, *nearest;
  int *seen; // chosen tokens that `nearest` knows
};

template <class T> __device__ float inner_product(const T *a, const T *b, int64_t width) {
  float sum = 0;
#pragma unroll 4
  for (int64_t k = lane_id(); k < width; k += 32)
    sum += load(a[k]) * load(b[k]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    sum += __shfl_xor_sync(all_lanes, sum, step);
  return sum;
}

__device__ int64_t own_token() { return blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32; }

template <class T> __global__ void __launch_bounds__(block_threads) begin_choice(Diverse d, State s) {
  const int64_t t = own_token();
  if (t >= d.rows.size)
    return;
  int64_t r = count_at_most(d.rows.end, d.rows.count, t);
  if (r == d.rows.count || t < d.rows.begin[r] || (d.rows.mask && !d.rows.mask[t]))
    r = -1;
  if (lane_id() == 0) {
    d.order[t] = -1;
    s.row[t] = r;
  }
  if (r < 0 || d.steps == 0)
    return;
  const T *x = static_cast<const T *>(d.x) + t * d.width;
  const float square = inner_product(x, x, d.width), score = checked_score(d.score[t], square);
  if (lane_id() > 0)
    return;
  s.score[t] = score;
  s.inverse[t] = inverse_norm(square);
  s.nearest[t] = no_cosine;
  s.seen[t] = 0;
  atomicMax(s.best + r * d.steps, static_cast<unsigned long long>(candidate(score, t)));
}

// Marks the token that the step before has chosen, and finds the best of the others.
template <class T> __global__ void __launch_bounds__(block_threads) take_step(Diverse d, State s, int step) {
  const int64_t t = own_token();
  const int64_t r = t < d.rows.size ? s.row[t] : -1;
  if (r < 0 || step > d.number[r])
    return;
  unsigned long long *best = s.best + r * d.steps;
  if (token_of(best[step - 1]) == t) {
    __syncwarp(); // all lanes have read the row that one of them changes
    if (lane_id() == 0) {
      d.order[t] = step - 1;
      s.row[t] = -1;
    }
    return;
  }
  if (step >= d.steps || step >= d.number[r])
    return;
  // One lane reads what others change, so that all lanes go the same way.
  unsigned long long known = 0;
  if (lane_id() == 0)
    known = ::cuda::atomic_ref<unsigned long long, ::cuda::thread_scope_device>(best[step])
                .load(::cuda::std::memory_order_relaxed);
  known = __shfl_sync(all_lanes, known, 0);
  const T *x = static_cast<const T *>(d.x);
  const float score = s.score[t], inverse = s.inverse[t];
  float nearest = s.nearest[t];
  int seen = s.seen[t];
  const int before = seen;
  uint64_t own = candidate(worth(d, score, nearest), t);
  while (own > known && seen < step) {
    const int64_t other = token_of(best[seen++]);
    const float cosine =
        inner_product(x + t * d.width, x + other * d.width, d.width) * inverse * s.inverse[other];
    nearest = cosine > nearest ? cosine : nearest;
    own = candidate(worth(d, score, nearest), t);
  }
  __syncwarp(); // all lanes have read what one of them changes
  if (lane_id() > 0)
    return;
  if (seen > before) {
    s.nearest[t] = nearest;
    s.seen[t] = seen;
  }
  if (own > known)
    atomicMax(best + step, static_cast<unsigned long long>(own));
}

} // namespace

void diverse(const Diverse &d, Queue &queue) {
  const int64_t N = d.rows.size, blocks = ceil_div(N, warps_per_block);
  if (d.steps > INT32_MAX)
    throw std::runtime_error("diverse: steps: expected at most 2^31 - 1, got " + std::to_string(d.steps));
  State s{};
  const int64_t most = d.rows.count * d.steps;
  allocate_together(queue, Wanted{s.best, most}, Wanted{s.row, N}, Wanted{s.score, N}, Wanted{s.inverse, N},
                    Wanted{s.nearest, N}, Wanted{s.seen, N});
  clear(op, queue, s.best, most * int64_t(sizeof *s.best));
  with_vectors(d.type, [&](auto element) {
    using T = decltype(element);
    launch(op, queue, begin_choice<T>, blocks, block_threads, d, s);
    for (int64_t step = 1; step <= d.steps; ++step)
      launch(op, queue, take_step<T>, blocks, block_threads, d, s, step);
  });
}

} // namespace tokcredit::cuda
