// Stable sorting by small integers, and where each of them begins: on the queue, with its scratch, or by one
// block when there are few, which spares launches.
#pragma once
#include "cuda/tile.cuh"
#include <cub/block/block_radix_sort.cuh>
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

// Keys and values of one block's sort are 16 bits wide, which holds them in its shared memory.
constexpr int sorting_threads = 512, sorted_per_thread = 24;
constexpr int64_t most_sorted_by_block = sorting_threads * sorted_per_thread;

__device__ inline void sort_blocked_to_striped(uint16_t (&key)[sorted_per_thread],
                                               uint16_t (&value)[sorted_per_thread], int bits) {
  // Four bits in each pass. Counters are read twice (false): there are no registers to keep them.
  using Sort = cub::BlockRadixSort<uint16_t, sorting_threads, sorted_per_thread, uint16_t, 4, false>;
  __shared__ typename Sort::TempStorage scratch;
  Sort(scratch).SortBlockedToStriped(key, value, 0, bits);
}

// Sorts the items [0, size) by key_of(item), of so many bits, and finds where each key in [0, count) begins,
// as sort_pairs and starts_of do. By a block of sorting_threads, once; at most most_sorted_by_block items.
template <class KeyOf>
__device__ void sort_by_block(int64_t size, int bits, KeyOf &&key_of, uint32_t *keys, uint32_t *items,
                              int64_t *starts, int64_t count) {
  uint16_t key[sorted_per_thread], item[sorted_per_thread];
#pragma unroll
  for (int u = 0; u < sorted_per_thread; ++u) {
    const int i = int(threadIdx.x) * sorted_per_thread + u;
    key[u] = i < size ? uint16_t(key_of(i)) : uint16_t(0xffff); // what is no item stays behind all that are
    item[u] = uint16_t(i);
  }
  sort_blocked_to_striped(key, item, bits);
#pragma unroll
  for (int u = 0; u < sorted_per_thread; ++u) {
    const int i = u * sorting_threads + int(threadIdx.x);
    if (i < size) {
      keys[i] = key[u];
      items[i] = item[u];
    }
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k <= count; k += sorting_threads)
    starts[k] = count_below(keys, size, uint32_t(k));
  __syncthreads();
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
