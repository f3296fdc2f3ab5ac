// The part of the DLPack 1.x binary interface that reading and making a tensor needs
// (https://dmlc.github.io/dlpack): field order and types are the standard's, the rest of the standard is left
// out.
#pragma once
#include <cstdint>

namespace tokcredit::dlpack {

enum Device : int32_t { device_cpu = 1, device_cuda = 2 };
enum Code : uint8_t { code_int = 0, code_uint = 1, code_float = 2, code_bfloat = 4, code_bool = 6 };

struct Tensor {
  void *data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t *shape;
  int64_t *strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  uint32_t major;
  uint32_t minor;
  void *context;
  void (*release)(ManagedTensor *);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi *previous;
  int (*allocate)(Tensor *prototype, ManagedTensor **out, void *context,
                  void (*fail)(void *context, const char *kind, const char *message));
  void *managed_from_object;
  int (*managed_to_object)(ManagedTensor *tensor, void **object);
  int (*borrow)(void *object, Tensor *out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
};

} // namespace tokcredit::dlpack
