#include "cuda/launch.cuh"
#include "ops/device.hpp"

namespace tokcredit::cuda {

DeviceGuard::DeviceGuard(int device) : previous_(device) {
  check(cudaGetDevice(&previous_), "device");
  if (previous_ != device)
    check(cudaSetDevice(device), "device");
  else
    previous_ = -1;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0)
    cudaSetDevice(previous_);
}

} // namespace tokcredit::cuda
