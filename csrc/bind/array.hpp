// Tensors as the contracts want them: a pointer, checked once. The only place that looks into a Python
// tensor. Nothing that a caller passes may make an operation touch memory outside its tensors: here kind,
// dtype, layout, device and size of every tensor are checked, and on the CPU also the numbers that an
// operation takes for places (spans, ids of nodes). On CUDA to look at those would mean to wait for the
// device: kernels clamp.
#pragma once
#include "bind/dlpack.hpp"
#include "ops/array.hpp"
#include "ops/device.hpp"
#include "ops/places.hpp"
#include <pybind11/pybind11.h>
#include <string>
#include <vector>
#ifdef TOKCREDIT_EMULATED // tests/emulation: every call runs the CUDA kernels, on the host
#include "emulation/queue.hpp"
#endif

namespace tokcredit::bind {

namespace py = pybind11;

// Valid while the tensor is.
struct Array {
  void *data = nullptr;
  Type type = Type::f32;
  const int64_t *shape = nullptr;
  int32_t dimensions = 0;
  int64_t size = 0;

  template <class T> T *as() const { return static_cast<T *>(data); }
};

// A tensor (rows, columns) or (slices, rows, columns), with columns side by side.
struct Matrix {
  Array array;
  int64_t rows, columns;
  Places places;
};

std::string name_of(Type type);
std::string text(const Array &array); // dtype and shape

// The words of an enumeration made by TOKCREDIT_ENUM.
std::vector<std::string> split(const char *words);

// A tensor that owns `managed`, and releases it when torch drops it.
py::object tensor_over(dlpack::ManagedTensor &managed);

// One call of one operation: reads its tensors, insists on one device, and knows where to run.
class Call {
public:
  explicit Call(const char *op) : op_(op) {}

  Array read(const char *name, const py::handle &tensor);
  Array read(const char *name, const py::handle &tensor, Type type, int64_t size);
  Array read_float(const char *name, const py::handle &tensor);
  // Rows need not lie side by side, but each apart from the others.
  Matrix read_matrix(const char *name, const py::handle &tensor);
  // None becomes a null pointer.
  Array optional(const char *name, const py::handle &tensor, Type type, int64_t size);
  Rows rows(const py::handle &begin, const py::handle &end, const py::handle &mask, int64_t size);

  // The group of each row, below `count`.
  const int64_t *groups(const py::handle &group, int64_t count, int64_t rows);

  template <class T> const T *read_as(const char *name, const py::handle &tensor, Type type, int64_t size) {
    return read(name, tensor, type, size).as<T>();
  }

  // The checks of numbers; on CUDA none is made.
  void check_spans(const char *names, const int64_t *begin, const int64_t *end, int64_t count,
                   int64_t size) const;
  void check_range(const char *name, const int64_t *x, int64_t count, int64_t low, int64_t high) const;

  // A number as a member of an enumeration.
  template <class E> E one_of(const char *name, int number, const char *words) const {
    int last = 0;
    for (const char *c = words; *c; ++c)
      last += *c == ',';
    if (number < 0 || number > last)
      fail(name, "0 to " + std::to_string(last) + " (" + words + ")", std::to_string(number));
    return E(number);
  }

  [[noreturn]] void fail(const char *name, const std::string &expected, const std::string &got) const;
#ifdef TOKCREDIT_EMULATED
  bool on_cuda() const { return true; }
#else
  bool on_cuda() const { return device_type_ == dlpack::device_cuda; }
#endif

  // Runs `cpu()` or `device(queue)` without the GIL. `device` is a generic lambda: a build without CUDA never
  // instantiates it, and says in one sentence that it was built so.
  template <class Cpu, class Cuda> void run(Cpu &&cpu, Cuda &&device) const;

private:
  Array borrow(const char *name, const py::handle &tensor, dlpack::Tensor &t);
  void know(const Array &array, int64_t size) const;
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
