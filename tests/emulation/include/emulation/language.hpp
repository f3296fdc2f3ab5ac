// CUDA C++ for a host compiler: keywords, built-in variables and device functions. Included before every .cu
// file, which is compiled as it stands.
#pragma once
#include "emulation/engine.hpp"
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
// The thread-local segment of the library then holds the shared memory of one block, and nothing else.
#define __shared__ static thread_local

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())

#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATION_HERE(what)                                                                                 \
  ::emulation::Site { what, file, line }

inline void __syncthreads(EMULATION_SITE) { ::emulation::sync_block(EMULATION_HERE("__syncthreads")); }
inline void __syncwarp(EMULATION_SITE) { ::emulation::sync_warp(EMULATION_HERE("__syncwarp")); }
inline void __threadfence() { ::emulation::fence(::emulation::Order::acquire_release); }

namespace emulation {
template <class T> uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= 8, "at most 8 bytes travel between lanes");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T> T from_bits(uint64_t bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
} // namespace emulation

template <class T> T __shfl_sync(unsigned, T x, int lane, EMULATION_SITE) {
  return ::emulation::from_bits<T>(
      ::emulation::shuffle(::emulation::to_bits(x), lane & 31, EMULATION_HERE("__shfl_sync")));
}
template <class T> T __shfl_up_sync(unsigned, T x, unsigned delta, EMULATION_SITE) {
  const int lane = int(threadIdx.x % 32), from = lane - int(delta);
  return ::emulation::from_bits<T>(::emulation::shuffle(::emulation::to_bits(x), from < 0 ? lane : from,
                                                        EMULATION_HERE("__shfl_up_sync")));
}
template <class T> T __shfl_down_sync(unsigned, T x, unsigned delta, EMULATION_SITE) {
  const int lane = int(threadIdx.x % 32), from = lane + int(delta);
  return ::emulation::from_bits<T>(::emulation::shuffle(::emulation::to_bits(x), from > 31 ? lane : from,
                                                        EMULATION_HERE("__shfl_down_sync")));
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask, EMULATION_SITE) {
  return ::emulation::from_bits<T>(::emulation::shuffle(
      ::emulation::to_bits(x), (int(threadIdx.x) ^ mask) & 31, EMULATION_HERE("__shfl_xor_sync")));
}
inline unsigned __ballot_sync(unsigned, bool vote, EMULATION_SITE) {
  return ::emulation::ballot(vote, EMULATION_HERE("__ballot_sync"));
}
inline bool __any_sync(unsigned, bool vote, EMULATION_SITE) {
  return ::emulation::ballot(vote, EMULATION_HERE("__any_sync")) != 0;
}
inline bool __all_sync(unsigned, bool vote, EMULATION_SITE) {
  return ::emulation::ballot(vote, EMULATION_HERE("__all_sync")) == 0xffffffffu;
}
template <class T> unsigned __match_any_sync(unsigned, T x, EMULATION_SITE) {
  return ::emulation::match_any(::emulation::to_bits(x), EMULATION_HERE("__match_any_sync"));
}
inline unsigned __reduce_min_sync(unsigned, unsigned x, EMULATION_SITE) {
  return ::emulation::reduce_min(x, EMULATION_HERE("__reduce_min_sync"));
}
inline int __reduce_add_sync(unsigned, int x, EMULATION_SITE) {
  return ::emulation::reduce_add(x, EMULATION_HERE("__reduce_add_sync"));
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
template <class T> void __stwb(T *address, T value) { *address = value; }

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(b) : C(a);
}

template <class T> T atomicAdd(T *address, T value) {
  return T(::emulation::atomic(::emulation::Atomic::add, address, sizeof(T), uint64_t(value),
                               ::emulation::Order::relaxed));
}
inline unsigned long long atomicMax(unsigned long long *address, unsigned long long value) {
  return ::emulation::atomic(::emulation::Atomic::largest, address, sizeof value, value,
                             ::emulation::Order::relaxed);
}
inline unsigned atomicOr(unsigned *address, unsigned value) {
  return unsigned(::emulation::atomic(::emulation::Atomic::bit_or, address, sizeof value, value,
                                      ::emulation::Order::relaxed));
}
