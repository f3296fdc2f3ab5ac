// The tensor's CUDA device for the length of a call; the caller's is restored afterwards.
#pragma once

namespace tokcredit::cuda {

class DeviceGuard {
public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;

private:
  int previous_; // -1: it was current already
};

} // namespace tokcredit::cuda
