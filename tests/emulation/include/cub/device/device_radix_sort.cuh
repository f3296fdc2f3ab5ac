// A stable sort by the low bits of the keys, by the host. The first call asks for the size of the scratch, as
// with CUB.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

namespace cub {

struct DeviceRadixSort {
  template <class Key, class Value>
  static int SortPairs(void *scratch, size_t &bytes, const Key *keys, Key *keys_out, const Value *values,
                       Value *values_out, int64_t size, int low, int high, cudaStream_t) {
    if (!scratch) {
      bytes = 64;
      return 0;
    }
    ::emulation::host_launches();
    memset(scratch, 0x5a, bytes);
    const uint64_t mask = high - low < 64 ? (uint64_t(1) << (high - low)) - 1 : ~uint64_t(0);
    std::vector<int64_t> order(static_cast<size_t>(size));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return (uint64_t(keys[a]) >> low & mask) < (uint64_t(keys[b]) >> low & mask);
    });
    for (int64_t i = 0; i < size; ++i) {
      keys_out[i] = keys[order[size_t(i)]];
      values_out[i] = values[order[size_t(i)]];
    }
    ::emulation::host_writes(keys_out, size_t(size) * sizeof(Key));
    ::emulation::host_writes(values_out, size_t(size) * sizeof(Value));
    return 0;
  }
};

} // namespace cub
