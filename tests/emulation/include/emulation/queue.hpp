// The queue of an emulated call: it knows the arrays of the call by their bounds, and its scratch holds
// garbage.
#pragma once
#include "ops/device.hpp"
#include <vector>

namespace emulation {

class Queue final : public tokcredit::cuda::Queue {
public:
  Queue() : tokcredit::cuda::Queue(nullptr) {}
  ~Queue();
  void know(void *array, int64_t bytes);
  void *allocate(int64_t bytes) override;

private:
  std::vector<void *> scratch_;
};

} // namespace emulation
