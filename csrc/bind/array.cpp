#include "bind/array.hpp"
#include "bind/dlpack.hpp"
#include <string>

namespace tokcredit::bind {
namespace {

// The exchange table that a type carries, or null.
const dlpack::ExchangeApi *table_of(const py::handle &type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
    return nullptr;
  auto *found =
      static_cast<const dlpack::ExchangeApi *>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (found && found->major != 1)
    found = found->previous;
  return found;
}

const dlpack::ExchangeApi *torch_table() {
  static const dlpack::ExchangeApi *table = nullptr;
  if (!table)
    table = table_of(py::module_::import("torch").attr("Tensor"));
  return table;
}

// torch.Tensor's exchange table, for objects whose type carries it: torch.Tensor and its subclasses. Types
// that passed are kept alive, so that a type made later at the same address is looked at anew.
const dlpack::ExchangeApi *exchange(const py::handle &tensor) {
  static std::vector<PyTypeObject *> known;
  const dlpack::ExchangeApi *table = torch_table();
  PyTypeObject *type = Py_TYPE(tensor.ptr());
  for (PyTypeObject *seen : known)
    if (seen == type)
      return table;
  if (!table || table_of(py::type::of(tensor)) != table)
    return nullptr;
  Py_INCREF(type);
  known.push_back(type);
  return table;
}

const char *name_of(Type type) {
  static const char *names[] = {"float32", "float64", "bfloat16", "float16", "int32", "int64", "bool"};
  return names[int(type)];
}

bool type_of(const dlpack::Tensor &t, Type &out) {
  if (t.lanes != 1)
    return false;
  switch (t.code) {
  case dlpack::code_float:
    out = t.bits == 64 ? Type::f64 : t.bits == 32 ? Type::f32 : Type::f16;
    return t.bits >= 16;
  case dlpack::code_bfloat:
    out = Type::bf16;
    return t.bits == 16;
  case dlpack::code_int:
    out = t.bits == 64 ? Type::i64 : Type::i32;
    return t.bits == 64 || t.bits == 32;
  case dlpack::code_bool:
    out = Type::b8;
    return t.bits == 8;
  default:
    return false;
  }
}

void *current_stream(int32_t device_type, int32_t device_id) {
  void *out = nullptr;
  if (torch_table()->current_stream(device_type, device_id, &out) != 0)
    throw py::error_already_set();
  return out;
}

std::string text(const std::vector<int64_t> &shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

} // namespace

int64_t Array::size() const {
  int64_t n = 1;
  for (int64_t extent : shape)
    n *= extent;
  return n;
}

py::object tensor_over(dlpack::ManagedTensor &managed) {
  void *object = nullptr;
  if (torch_table()->managed_to_object(&managed, &object) != 0)
    throw py::error_already_set(); // torch may have released it already
  return py::reinterpret_steal<py::object>(static_cast<PyObject *>(object));
}

void Call::fail(const char *name, const std::string &expected, const std::string &got) const {
  throw py::value_error(std::string(op_) + ": " + name + ": expected " + expected + ", got " + got);
}

Array Call::read(const char *name, const py::handle &tensor) {
  const dlpack::ExchangeApi *api = exchange(tensor);
  const std::string python_type = Py_TYPE(tensor.ptr())->tp_name;
  // A subclass may override the data (FakeTensor has none), so only what carries the table itself is
  // borrowed.
  if (!api || !py::hasattr(py::type::of(tensor), "__dlpack_c_exchange_api__"))
    throw py::type_error(std::string(op_) + ": " + name + ": expected torch.Tensor, got " + python_type);
  dlpack::Tensor t{};
  if (api->borrow(tensor.ptr(), &t) != 0)
    throw py::error_already_set();
  Array out;
  out.data = static_cast<char *>(t.data) + t.byte_offset;
  out.device_type = t.device_type;
  out.device_id = t.device_id;
  out.shape.assign(t.shape, t.shape + t.ndim);
  if (!type_of(t, out.type))
    fail(name, "a float, int32, int64 or bool dtype", "another dtype");
  if (!t.data && out.size() > 0)
    fail(name, "a tensor with data", python_type + " without data");
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.strides && t.shape[i] > 1 && out.size() > 0 && t.strides[i] != stride)
      fail(name, "a contiguous tensor", "strides of another layout");
    stride *= t.shape[i];
  }
#ifdef TOKCREDIT_EMULATED
  emulated_.know(out.data, out.size() * bytes_of(out.type));
#endif
  if (device_type_ == 0) {
    device_type_ = t.device_type;
    device_id_ = t.device_id;
    if (device_type_ != dlpack::device_cpu && device_type_ != dlpack::device_cuda)
      fail(name, "a CPU or CUDA tensor", "another device");
  } else if (device_type_ != t.device_type || device_id_ != t.device_id) {
    fail(name, "the device of the other arguments", "another device");
  }
  return out;
}

Array Call::read(const char *name, const py::handle &tensor, Type type, int64_t size) {
  Array out = read(name, tensor);
  if (out.type != type || out.size() != size)
    fail(name, std::string(name_of(type)) + " [" + std::to_string(size) + "]",
         std::string(name_of(out.type)) + " " + text(out.shape));
  return out;
}

Array Call::optional(const char *name, const py::handle &tensor, Type type, int64_t size) {
  return tensor.is_none() ? Array{} : read(name, tensor, type, size);
}

Rows Call::rows(const py::handle &begin, const py::handle &end, const py::handle &mask, int64_t size) {
  const Array first = read("begin", begin);
  const int64_t count = first.size();
  return {read("begin", begin, Type::i64, count).as<int64_t>(),
          read("end", end, Type::i64, count).as<int64_t>(), optional("mask", mask, Type::b8, size).as<bool>(),
          count, size};
}

bool Call::on_cuda() const {
#ifdef TOKCREDIT_EMULATED
  return true;
#else
  return device_type_ == dlpack::device_cuda;
#endif
}

void Call::no_cuda() const {
  throw std::runtime_error(std::string(op_) +
                           ": expected CPU tensors, because this tokcredit was built without CUDA, got CUDA "
                           "tensors (rebuild with TOKCREDIT_CUDA=ON)");
}

TorchQueue::TorchQueue(const char *op, int32_t device_type, int32_t device_id)
    : Queue(current_stream(device_type, device_id)), op_(op), device_type_(device_type),
      device_id_(device_id) {}

TorchQueue::~TorchQueue() {
  for (dlpack::ManagedTensor *memory : scratch_)
    memory->release(memory);
}

void *TorchQueue::allocate(int64_t bytes) {
  dlpack::Tensor wanted{nullptr, device_type_, device_id_, 1, dlpack::code_uint, 8, 1, &bytes, nullptr, 0};
  dlpack::ManagedTensor *memory = nullptr;
  std::string failure = std::string(op_) + ": scratch: expected " + std::to_string(bytes) + " bytes, got ";
  const auto note = [](void *context, const char *, const char *message) {
    *static_cast<std::string *>(context) += message;
  };
  if (torch_table()->allocate(&wanted, &memory, &failure, note) != 0 || !memory)
    throw std::runtime_error(failure);
  scratch_.push_back(memory);
  return static_cast<char *>(memory->tensor.data) + memory->tensor.byte_offset;
}

} // namespace tokcredit::bind
