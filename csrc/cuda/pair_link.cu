// One block: pairs are few. Each thread adds its own pairs, in order, and one thread what all have added.
#include "cuda/launch.cuh"
#include "math/pair_link.hpp"

namespace tokcredit::cuda {
namespace {

constexpr int threads = 256;

template <class A> __global__ void __launch_bounds__(threads) all_pairs(PairLink l) {
  for (int64_t row = threadIdx.x; row < l.rows; row += threads)
    static_cast<A *>(l.slopes)[row] = A(0);
  __syncthreads();
  double total = 0;
  for (int64_t p = threadIdx.x; p < l.count; p += threads) {
    const int64_t chosen = row_of(l, p, 0), rejected = row_of(l, p, 1);
    if (chosen >= 0 && chosen < l.rows && rejected >= 0 && rejected < l.rows) {
      total += link_pair<A>(l, p);
    } else { // an error would mean to wait for the device
      for (int i = 0; i < pair_columns; ++i)
        l.table[p * pair_columns + i] = double(NAN);
      total = double(NAN);
    }
  }
  __shared__ double part[threads];
  part[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x != 0)
    return;
  for (int t = 1; t < threads; ++t)
    total += part[t];
  *static_cast<A *>(l.total) = A(total);
}

} // namespace

void pair_link(const PairLink &l, Queue &queue) {
  launch("pair_link", queue, l.type == Type::f64 ? all_pairs<double> : all_pairs<float>, 1, threads, l);
}

} // namespace tokcredit::cuda
