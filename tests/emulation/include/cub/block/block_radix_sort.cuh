// A stable sort by the low bits of the keys. The storage may be used again after a barrier only.
#pragma once

namespace cub {

template <class Key, int threads, int own, class Value, int bits, bool memoize> class BlockRadixSort {
public:
  struct TempStorage {
    Key key[threads * own];
    Value value[threads * own];
  };

  explicit BlockRadixSort(TempStorage &storage) : storage_(storage) {}

  void SortBlockedToStriped(Key (&key)[own], Value (&value)[own], int low, int high) {
    for (int u = 0; u < own; ++u) {
      storage_.key[threadIdx.x * own + u] = key[u];
      storage_.value[threadIdx.x * own + u] = value[u];
    }
    __syncthreads();
    if (threadIdx.x == 0)
      ::emulation::sort_pairs(storage_.key, storage_.value, threads * own, low, high);
    __syncthreads();
    for (int u = 0; u < own; ++u) {
      key[u] = storage_.key[u * threads + threadIdx.x];
      value[u] = storage_.value[u * threads + threadIdx.x];
    }
  }

private:
  TempStorage &storage_;
};

} // namespace cub
