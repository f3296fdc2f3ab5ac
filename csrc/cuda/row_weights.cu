// One block: rows are few.
#include "cuda/launch.cuh"
#include "math/row_weights.hpp"

namespace tokcredit::cuda {
namespace {

constexpr int threads = 256;

__global__ void __launch_bounds__(threads) weigh(RowWeights w) {
  __shared__ int64_t part[threads];
  int64_t count = 0;
  for (int64_t r = threadIdx.x; w.given < 0 && r < w.rows; r += threads)
    count += share_of_count(w, r);
  part[threadIdx.x] = count;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half)
      part[threadIdx.x] += part[threadIdx.x + half];
  }
  __syncthreads();
  count = w.given < 0 ? part[0] : w.given;
  for (int64_t r = threadIdx.x; r < (w.by_length ? w.rows : 1); r += threads)
    w.y[r] = row_weight(w, count, r);
}

} // namespace

void row_weights(const RowWeights &w, Queue &queue) { launch("row_weights", queue, weigh, 1, threads, w); }

} // namespace tokcredit::cuda
