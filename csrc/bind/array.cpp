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

} // namespace

std::string name_of(Type type) { return split(Type_words)[size_t(type)]; }

std::string text(const Array &array) {
  std::string out = name_of(array.type) + " [";
  for (int32_t i = 0; i < array.dimensions; ++i)
    out += (i ? ", " : "") + std::to_string(array.shape[i]);
  return out + "]";
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

Array Call::borrow(const char *name, const py::handle &tensor, dlpack::Tensor &t) {
  const dlpack::ExchangeApi *api = exchange(tensor);
  if (!api)
    throw py::type_error(std::string(op_) + ": " + name + ": expected torch.Tensor, got " +
                         Py_TYPE(tensor.ptr())->tp_name);
  if (api->borrow(tensor.ptr(), &t) != 0)
    throw py::error_already_set();
  Array out;
  if (!type_of(t, out.type))
    fail(name, "a float, int32, int64 or bool dtype", "another dtype");
  out.data = static_cast<char *>(t.data) + t.byte_offset;
  out.shape = t.shape;
  out.dimensions = t.ndim;
  out.size = 1;
  for (int32_t i = 0; i < t.ndim; ++i)
    out.size *= t.shape[i];
  // A subclass may override where its data are; a FakeTensor has none.
  if (!t.data && out.size > 0)
    fail(name, "a tensor with data", Py_TYPE(tensor.ptr())->tp_name + std::string(" without data"));
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

void Call::know([[maybe_unused]] const Array &array, [[maybe_unused]] int64_t size) const {
#ifdef TOKCREDIT_EMULATED
  emulated_.know(array.data, size * bytes_of(array.type));
#endif
}

Array Call::read(const char *name, const py::handle &tensor) {
  dlpack::Tensor t{};
  const Array out = borrow(name, tensor, t);
  bool contiguous = true;
  int64_t size = 1;
  for (int32_t i = t.ndim; i-- > 0; size *= t.shape[i])
    contiguous &= !t.strides || t.shape[i] <= 1 || t.strides[i] == size;
  if (!contiguous && out.size > 0)
    fail(name, "a contiguous tensor", "strides of another layout");
  know(out, out.size);
  return out;
}

Matrix Call::read_matrix(const char *name, const py::handle &tensor) {
  dlpack::Tensor t{};
  const Array out = borrow(name, tensor, t);
  if (out.dimensions != 2 && out.dimensions != 3)
    fail(name, "a matrix, or slices of one", text(out));
  const int64_t slices = out.dimensions == 3 ? t.shape[0] : 1, *shape = t.shape + out.dimensions - 2;
  const int64_t inner = shape[0], columns = shape[1];
  const int64_t *strides = t.strides ? t.strides + out.dimensions - 2 : nullptr;
  const Places places{inner,
                      slices <= 1 ? inner * columns
                      : t.strides ? t.strides[0]
                                  : inner * columns,
                      inner > 1 && strides ? strides[0] : columns};
  if (out.size == 0)
    return {out, slices * inner, columns, places};
  const int64_t outer = slices > 1 ? places.outer_stride : INT64_MAX,
                close = inner > 1 ? places.inner_stride : INT64_MAX;
  const bool apart = close <= outer ? close >= columns && outer / inner >= close
                                    : outer >= columns && close / slices >= outer;
  if (!apart || (strides && columns > 1 && strides[1] != 1))
    fail(name, "columns side by side and rows apart from each other", "strides of another layout");
  know(out, (slices - 1) * places.outer_stride + (inner - 1) * places.inner_stride + columns);
  return {out, slices * inner, columns, places};
}

Array Call::read(const char *name, const py::handle &tensor, Type type, int64_t size) {
  const Array out = read(name, tensor);
  if (out.type != type || out.size != size)
    fail(name, name_of(type) + " [" + std::to_string(size) + "]", text(out));
  return out;
}

Array Call::read_float(const char *name, const py::handle &tensor) {
  const Array out = read(name, tensor);
  if (!is_float(out.type))
    fail(name, "a float dtype", name_of(out.type));
  return out;
}

Array Call::optional(const char *name, const py::handle &tensor, Type type, int64_t size) {
  return tensor.is_none() ? Array{} : read(name, tensor, type, size);
}

Rows Call::rows(const py::handle &begin, const py::handle &end, const py::handle &mask, int64_t size) {
  const Array first = read("begin", begin);
  if (first.type != Type::i64)
    fail("begin", "int64", name_of(first.type));
  const Rows out{first.as<int64_t>(), read_as<int64_t>("end", end, Type::i64, first.size),
                 optional("mask", mask, Type::b8, size).as<bool>(), first.size, size};
  check_spans("begin, end", out.begin, out.end, out.count, size);
  return out;
}

const int64_t *Call::groups(const py::handle &group, int64_t count, int64_t rows) {
  constexpr int64_t most = int64_t(1) << 20; // memory grows with them
  if (count < 0 || count > most)
    fail("groups", "0 to " + std::to_string(most), std::to_string(count));
  const auto *out = read_as<int64_t>("group", group, Type::i64, rows);
  check_range("group", out, rows, 0, count);
  return out;
}

void Call::check_spans(const char *names, const int64_t *begin, const int64_t *end, int64_t count,
                       int64_t size) const {
  if (on_cuda())
    return;
  int64_t last = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (begin[r] < last || end[r] < begin[r] || end[r] > size)
      fail(names, "ascending, disjoint spans inside [0, " + std::to_string(size) + "]",
           "[" + std::to_string(begin[r]) + ", " + std::to_string(end[r]) + ") at " + std::to_string(r));
    last = end[r];
  }
}

void Call::check_range(const char *name, const int64_t *x, int64_t count, int64_t low, int64_t high) const {
  if (on_cuda())
    return;
  for (int64_t i = 0; i < count; ++i)
    if (x[i] < low || x[i] >= high)
      fail(name, "numbers in [" + std::to_string(low) + ", " + std::to_string(high) + ")",
           std::to_string(x[i]) + " at " + std::to_string(i));
}

std::vector<std::string> split(const char *words) {
  std::vector<std::string> out(1);
  for (const char *c = words; *c; ++c)
    if (*c == ',')
      out.emplace_back();
    else if (*c != ' ')
      out.back() += *c;
  return out;
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
