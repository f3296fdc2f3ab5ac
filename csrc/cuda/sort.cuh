// Stable sorting by small integers, and where each of them begins; on the queue, with its scratch.
#pragma once
#include "cuda/tile.cuh"
#include <cub/device/device_radix_sort.cuh>

namespace tokcredit::cuda {

// Bits of the numbers from 0 to `most`.
inline int bits_of(uint64_t most) {
  int bits = 1;
  while (most >>= 1)
    ++bits;
  return bits;
}

template <class Key, class Value> struct Sorted {
  const Key *keys;
  const Value *values;
};

template <class Key, class Value>
Sorted<Key, Value> sort_pairs(const char *op, Queue &queue, const Key *keys, const Value *values,
                              int64_t size, int bits) {
  Key *keys_out = queue.allocate_array<Key>(size);
  Value *values_out = queue.allocate_array<Value>(size);
  size_t bytes = 0;
  const auto sort = [&](void *scratch) {
    check(cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, keys_out, values, values_out, size, 0, bits,
                                          stream_of(queue)),
          op);
  };
  sort(nullptr);
  sort(queue.allocate(int64_t(bytes)));
  return {keys_out, values_out};
}

// The number of entries of a sorted array that are below `key`, by one thread.
template <class Key> __device__ int64_t count_below(const Key *sorted, int64_t size, Key key) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sorted[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// starts[k] for k in [0, count]: the first entry that is at least k.
template <class Key>
__global__ void find_starts(const Key *sorted, int64_t size, int64_t *starts, int64_t count) {
  const int64_t k = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (k <= count)
    starts[k] = count_below(sorted, size, Key(k));
}

template <class Key>
const int64_t *starts_of(const char *op, Queue &queue, const Key *sorted, int64_t size, int64_t count) {
  int64_t *starts = queue.allocate_array<int64_t>(count + 1);
  launch(op, queue, find_starts<Key>, ceil_div(count + 1, block_threads), block_threads, sorted, size, starts,
         count);
  return starts;
}

// Numbers that are sorted as 32-bit keys, one more for "none".
inline void check_fits(const char *op, const char *what, int64_t count) {
  if (count >= int64_t(0xffffffff))
    throw std::invalid_argument(std::string(op) + ": " + what + ": expected fewer than 2^32 - 1, got " +
                                std::to_string(count));
}

} // namespace tokcredit::cuda
