// Tensors as the contracts want them: a pointer, checked once. The only place that looks into a Python
// tensor.
#pragma once
#include "ops/array.hpp"
#include "ops/device.hpp"
#include <pybind11/pybind11.h>
#include <vector>

namespace tokcredit::bind {

namespace py = pybind11;

struct Array {
  void *data = nullptr;
  Type type = Type::f32;
  int32_t device_type = 0;
  int32_t device_id = 0;
  std::vector<int64_t> shape;

  int64_t size() const;
  template <class T> T *as() const { return static_cast<T *>(data); }
};

// One call of one operation: reads its tensors, insists on one device, and knows where to run.
class Call {
public:
  explicit Call(const char *op) : op_(op) {}

  Array read(const char *name, const py::handle &tensor);
  Array read(const char *name, const py::handle &tensor, Type type, int64_t size);
  // None becomes a null pointer.
  Array optional(const char *name, const py::handle &tensor, Type type, int64_t size);
  Rows rows(const py::handle &begin, const py::handle &end, const py::handle &mask, int64_t size);

  // Runs `cpu()` or `cuda(stream)` without the GIL. A build without CUDA says so in one sentence.
  template <class Cpu, class Cuda> void run(Cpu &&cpu, Cuda &&cuda) const;
  template <class Cpu> void run_on_cpu(Cpu &&cpu) const;

private:
  [[noreturn]] void fail(const char *name, const std::string &expected, const std::string &got) const;
  void *stream() const;
  bool on_cuda() const;
  [[noreturn]] void no_cuda() const;

  const char *op_;
  int32_t device_type_ = 0;
  int32_t device_id_ = 0;
};

} // namespace tokcredit::bind

namespace tokcredit::bind {

template <class Cpu> void Call::run_on_cpu(Cpu &&cpu) const {
  if (on_cuda())
    no_cuda();
  py::gil_scoped_release unlocked;
  cpu();
}

template <class Cpu, class Cuda> void Call::run(Cpu &&cpu, [[maybe_unused]] Cuda &&cuda) const {
#ifdef TOKCREDIT_CUDA
  if (on_cuda()) {
    void *current = stream();
    py::gil_scoped_release unlocked;
    tokcredit::cuda::DeviceGuard guard(device_id_);
    cuda(current);
    return;
  }
#endif
  run_on_cpu(cpu);
}

} // namespace tokcredit::bind
