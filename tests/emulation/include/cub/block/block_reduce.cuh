// As CUB promises and no more: thread 0 alone has the result, and the storage may be used again after a
// barrier only.
#pragma once

namespace cub {

template <class T, int threads> class BlockReduce {
public:
  struct TempStorage {
    alignas(T) char item[threads * sizeof(T)];
  };

  explicit BlockReduce(TempStorage &storage) : item_(reinterpret_cast<T *>(storage.item)) {}

  template <class Merge> T Reduce(const T &own, Merge merge) {
    item_[threadIdx.x] = own;
    __syncthreads();
    T all = item_[0];
    if (threadIdx.x != 0) {
      memset(static_cast<void *>(&all), 0x5a, sizeof all);
      return all;
    }
    for (int i = 1; i < threads; ++i)
      all = merge(all, item_[i]);
    return all;
  }

private:
  T *item_;
};

} // namespace cub
