// Launching kernels on a queue, with an error that names the operation.
#pragma once
#include "ops/device.hpp"
#include <cuda_runtime.h>
#include <stdexcept>
#include <string>

namespace tokcredit::cuda {

inline void check(cudaError_t status, const char *op) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

inline cudaStream_t stream_of(const Queue &queue) { return static_cast<cudaStream_t>(queue.stream()); }

__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

template <class... Parameters, class... Arguments>
void launch(const char *op, Queue &queue, void (*kernel)(Parameters...), int64_t blocks, int threads,
            Arguments... arguments) {
  if (blocks <= 0)
    return;
  if (blocks > 2147483647)
    throw std::runtime_error(std::string(op) + ": CUDA: expected at most 2^31 - 1 blocks, got " +
                             std::to_string(blocks));
  kernel<<<unsigned(blocks), unsigned(threads), 0, stream_of(queue)>>>(Parameters(arguments)...);
  check(cudaGetLastError(), op);
}

inline void clear(const char *op, Queue &queue, void *memory, int64_t bytes) {
  check(cudaMemsetAsync(memory, 0, size_t(bytes), stream_of(queue)), op);
}

} // namespace tokcredit::cuda
