// As CUB promises and no more: the storage may be used again after a barrier only.
#pragma once

namespace cub {

template <class T, int threads> class BlockScan {
public:
  struct TempStorage {
    T item[threads];
  };

  explicit BlockScan(TempStorage &storage) : storage_(storage) {}

  void ExclusiveSum(T own, T &before, T &total) {
    storage_.item[threadIdx.x] = own;
    __syncthreads();
    before = total = 0;
    for (unsigned i = 0; i < unsigned(threads); ++i) {
      before += i < threadIdx.x ? storage_.item[i] : 0;
      total += storage_.item[i];
    }
  }

private:
  TempStorage &storage_;
};

} // namespace cub
