// Run-length decoding on the device: one block per row, which walks the leaf's path and writes each run with
// stores of 16 bytes.
#include "cuda/launch.cuh"
#include "ops/tree.hpp"

namespace tokcredit::cuda {
namespace {

constexpr int threads_per_block = 256;

template <class T> __device__ T plus(T a, T b) { return a + b; }
template <> __device__ bool plus(bool a, bool b) { return a || b; }

template <class T> struct alignas(16) Pack {
  T item[16 / sizeof(T)];
};

// Writes y[first, last): `value`, with `head` added at `first` when `headed`; 0 where the mask is false.
template <class T>
__device__ void fill(T *y, const bool *mask, int64_t first, int64_t last, T value, T head, bool headed) {
  constexpr int64_t width = 16 / sizeof(T);
  const auto at = [&](int64_t t) {
    const T v = headed && t == first ? plus(value, head) : value;
    return !mask || mask[t] ? v : T{};
  };
  // Up to the first aligned address, then whole packs, then what is left.
  const int64_t offset = int64_t(reinterpret_cast<uintptr_t>(y + first) % 16 / sizeof(T));
  const int64_t body = min(last, first + (offset ? width - offset : 0));
  const int64_t packs = (last - body) / width;
  for (int64_t t = first + threadIdx.x; t < body; t += blockDim.x)
    y[t] = at(t);
  for (int64_t p = threadIdx.x; p < packs; p += blockDim.x) {
    Pack<T> pack;
    const int64_t t = body + p * width;
#pragma unroll
    for (int64_t k = 0; k < width; ++k)
      pack.item[k] = at(t + k);
    *reinterpret_cast<Pack<T> *>(y + t) = pack;
  }
  for (int64_t t = body + packs * width + threadIdx.x; t < last; t += blockDim.x)
    y[t] = at(t);
}

template <class T> __global__ void expand_rows(Expand e) {
  const T *row = static_cast<const T *>(e.row), *body = static_cast<const T *>(e.body),
          *head = static_cast<const T *>(e.head);
  T *y = static_cast<T *>(e.y);
  for (int64_t r = blockIdx.x; r < e.rows.count; r += gridDim.x) {
    const int64_t begin = e.rows.begin[r], end = e.rows.end[r];
    const T base = row ? row[r] : T{};
    if (!e.leaf) {
      fill(y, e.rows.mask, begin, end, base, T{}, false);
    } else {
      int64_t last = end;
      for (int64_t v = e.leaf[r]; v >= 0 && last > begin; v = e.parent[v]) {
        const int64_t first = begin + e.depth[v];
        fill(y, e.rows.mask, first, last, body ? plus(base, body[v]) : base, head ? head[v] : T{},
             head != nullptr);
        last = first;
      }
    }
    if (r == 0)
      fill(y, nullptr, 0, begin, T{}, T{}, false);
    fill(y, nullptr, end, r + 1 < e.rows.count ? e.rows.begin[r + 1] : e.rows.size, T{}, T{}, false);
  }
}

template <class T> void expand_as(const Expand &e, Queue &queue) {
  launch("expand", queue, expand_rows<T>, e.rows.count < 65536 ? e.rows.count : 65536, threads_per_block, e);
}

} // namespace

void expand(const Expand &e, Queue &queue) {
  switch (e.type) {
  case Type::f64:
    return expand_as<double>(e, queue);
  case Type::i64:
    return expand_as<int64_t>(e, queue);
  case Type::b8:
    return expand_as<bool>(e, queue);
  default:
    return expand_as<float>(e, queue);
  }
}

} // namespace tokcredit::cuda
