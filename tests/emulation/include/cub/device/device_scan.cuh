// Prefix sums by the host. The first call asks for the size of the scratch, as with CUB.
#pragma once

namespace cub {

struct DeviceScan {
  template <class In, class Out>
  static int ExclusiveSum(void *scratch, size_t &bytes, const In *in, Out *out, int64_t size, cudaStream_t) {
    return sum<false>(scratch, bytes, in, out, size);
  }
  template <class In, class Out>
  static int InclusiveSum(void *scratch, size_t &bytes, const In *in, Out *out, int64_t size, cudaStream_t) {
    return sum<true>(scratch, bytes, in, out, size);
  }

private:
  template <bool inclusive, class In, class Out>
  static int sum(void *scratch, size_t &bytes, const In *in, Out *out, int64_t size) {
    if (!scratch) {
      bytes = 64;
      return 0;
    }
    ::emulation::host_launches();
    memset(scratch, 0x5a, bytes);
    Out total = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Out before = total;
      total += Out(in[i]);
      out[i] = inclusive ? total : before;
    }
    ::emulation::host_writes(out, size_t(size) * sizeof(Out));
    return 0;
  }
};

} // namespace cub
