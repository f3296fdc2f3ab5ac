// Launching: the current device's limits and the error of the last launch.
#pragma once
#include <cuda_runtime.h>
#include <stdexcept>
#include <string>

namespace tokcredit::cuda {

inline void check(cudaError_t status, const char *op) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

} // namespace tokcredit::cuda
