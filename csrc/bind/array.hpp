// Tensors as the contracts want them: a pointer, checked once. The only place that looks into a Python
// tensor.
#pragma once
#include "bind/dlpack.hpp"
#include "ops/array.hpp"
#include "ops/device.hpp"
#include <pybind11/pybind11.h>
#include <vector>
#ifdef TOKCREDIT_EMULATED // tests/emulation: every call runs the CUDA kernels, on the host
#include "emulation/queue.hpp"
#endif

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

// A tensor that owns `managed`, and releases it when torch drops it.
py::object tensor_over(dlpack::ManagedTensor &managed);

// One call of one operation: reads its tensors, insists on one device, and knows where to run.
class Call {
public:
  explicit Call(const char *op) : op_(op) {}

  Array read(const char *name, const py::handle &tensor);
  Array read(const char *name, const py::handle &tensor, Type type, int64_t size);
  // None becomes a null pointer.
  Array optional(const char *name, const py::handle &tensor, Type type, int64_t size);
  Rows rows(const py::handle &begin, const py::handle &end, const py::handle &mask, int64_t size);

  // Runs `cpu()` or `device(queue)` without the GIL. `device` is a generic lambda: a build without CUDA never
  // instantiates it, and says in one sentence that it was built so.
  template <class Cpu, class Cuda> void run(Cpu &&cpu, Cuda &&device) const;

private:
  [[noreturn]] void fail(const char *name, const std::string &expected, const std::string &got) const;
  bool on_cuda() const;
  [[noreturn]] void no_cuda() const;

  const char *op_;
  int32_t device_type_ = 0;
  int32_t device_id_ = 0;
#ifdef TOKCREDIT_EMULATED
  mutable emulation::Queue emulated_;
#endif
};

// A queue whose scratch is allocated by torch, on the stream that is current there.
class TorchQueue final : public tokcredit::cuda::Queue {
public:
  TorchQueue(const char *op, int32_t device_type, int32_t device_id);
  ~TorchQueue();
  void *allocate(int64_t bytes) override;

private:
  const char *op_;
  int32_t device_type_, device_id_;
  std::vector<dlpack::ManagedTensor *> scratch_;
};

template <class Cpu, class Cuda>
void Call::run([[maybe_unused]] Cpu &&cpu, [[maybe_unused]] Cuda &&device) const {
#ifdef TOKCREDIT_EMULATED
  device(emulated_);
#else
  if (!on_cuda()) {
    py::gil_scoped_release unlocked;
    cpu();
    return;
  }
#ifdef TOKCREDIT_CUDA
  TorchQueue queue(op_, device_type_, device_id_);
  py::gil_scoped_release unlocked;
  tokcredit::cuda::DeviceGuard guard(device_id_);
  device(queue);
#else
  no_cuda();
#endif
#endif
}

} // namespace tokcredit::bind
