// Sixteen bytes at a time along one array, by the threads of a block.
#pragma once
#include "cuda/launch.cuh"

namespace tokcredit::cuda {

template <class T> struct alignas(16) Vector {
  static constexpr int width = 16 / sizeof(T);
  T item[width];
};

template <class T> __device__ Vector<T> load_vector(const T *p) {
  return *reinterpret_cast<const Vector<T> *>(p);
}

// As one number: a struct of narrow items would be taken apart into narrow stores.
template <class T> __device__ void store_vector(T *p, const Vector<T> &v) {
  uint4 bits;
  memcpy(&bits, &v, sizeof bits);
  __stwb(reinterpret_cast<uint4 *>(p), bits);
}

// The elements of an array of fewer than 2^31: those before the first whole vector, the vectors, the rest.
template <class T> struct Vectors {
  int head, runs, size;

  // Without `whole` there are no vectors.
  __device__ Vectors(const T *x, int64_t n, bool whole = true) : size(int(n)) {
    const int misplaced = int(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
    head = whole ? min(size, (Vector<T>::width - misplaced) % Vector<T>::width) : size;
    runs = (size - head) / Vector<T>::width;
  }

  // Calls one(i) for each element outside of the vectors.
  template <class One> __device__ void each_single(One &&one) const {
    for (int i = threadIdx.x; i < head; i += blockDim.x)
      one(i);
    for (int i = head + runs * Vector<T>::width + threadIdx.x; i < size; i += blockDim.x)
      one(i);
  }

  // Calls two(i, j) for two vectors at once, so that both are on their way together, and one(i) for what is
  // left.
  template <class Two, class One> __device__ void each_vector(Two &&two, One &&one) const {
    const int step = int(blockDim.x);
    int v = threadIdx.x;
    for (; v < runs - step; v += 2 * step)
      two(head + v * Vector<T>::width, head + (v + step) * Vector<T>::width);
    if (v < runs)
      one(head + v * Vector<T>::width);
  }
};

} // namespace tokcredit::cuda
