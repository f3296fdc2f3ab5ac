#include "ops/memory.hpp"
#include "bind/module.hpp"
#include <algorithm>
#include <memory>

namespace tokcredit::bind {
namespace {

// A tensor over memory of ours, which comes back when torch drops it.
struct Result {
  cpu::Memory memory;
  std::vector<int64_t> shape, strides;
  dlpack::ManagedTensor managed;
};

py::object empty(const py::tuple &shape, int type) {
  const Call call("empty");
  const auto element = call.one_of<Type>("dtype", type, Type_words);
  auto result = std::make_unique<Result>();
  result->shape.resize(shape.size());
  result->strides.resize(shape.size());
  constexpr int64_t most = int64_t(1) << 56; // bytes of it fit 64 bits
  int64_t size = 1;
  for (size_t i = shape.size(); i-- > 0; size *= result->shape[i]) {
    result->shape[i] = shape[i].cast<int64_t>();
    result->strides[i] = size;
    if (result->shape[i] < 0 || result->shape[i] > most / std::max<int64_t>(size, 1))
      call.fail("shape", "extents of a tensor", std::to_string(result->shape[i]));
  }
  result->memory = cpu::take(std::max<int64_t>(size * bytes_of(element), 1));
  const uint8_t code = element == Type::b8                            ? dlpack::code_bool
                       : element == Type::bf16                        ? dlpack::code_bfloat
                       : element == Type::i32 || element == Type::i64 ? dlpack::code_int
                                                                      : dlpack::code_float;
  dlpack::ManagedTensor &managed = result->managed;
  managed.major = 1;
  managed.context = result.get();
  managed.release = [](dlpack::ManagedTensor *self) {
    auto *released = static_cast<Result *>(self->context);
    cpu::give_back(released->memory);
    delete released;
  };
  managed.tensor = {result->memory.data,
                    dlpack::device_cpu,
                    0,
                    int32_t(result->shape.size()),
                    code,
                    uint8_t(8 * bytes_of(element)),
                    1,
                    result->shape.data(),
                    result->strides.data(),
                    0};
  return tensor_over(result.release()->managed);
}

} // namespace

void bind_memory(py::module_ &m) {
  m.attr("TYPES") = words(Type_words);
  m.def("empty", &empty);
  m.def("empty_cache", &cpu::empty_cache);
  m.attr("LARGE") = cpu::page_bytes;
}

} // namespace tokcredit::bind
