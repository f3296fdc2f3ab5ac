// Loops that become vector code on the machine they run on, with the same bits on every machine.
#pragma once
#include <cstdint>

// One wheel for every x86-64: the loader picks the widest version of each row loop that the machine can run.
// They give the same bits, because nothing is fused and sums are folded in a fixed order. It takes glibc's
// ifunc and a compiler that knows the architecture levels.
#if defined(__x86_64__) && defined(__GLIBC__) &&                                                             \
    ((defined(__clang__) && __clang_major__ >= 17) ||                                                        \
     (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12))
#define TOKCREDIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TOKCREDIT_CLONES
#endif
// A template must be inlined into each clone, or it would be compiled once for the oldest machine.
#if defined(__GNUC__)
#define TOKCREDIT_INLINE inline __attribute__((always_inline))
#else
#define TOKCREDIT_INLINE inline
#endif

namespace tokcredit::cpu {

constexpr int64_t lanes = 16;

// Pairwise: the upper half is added to the lower until `lanes` are left, which are added in double.
template <class A> TOKCREDIT_INLINE double fold(A *v, int64_t width) {
  for (int64_t half = width / 2; half >= lanes; half /= 2)
    for (int64_t k = 0; k < half; ++k)
      v[k] += v[k + half];
  double sum = 0;
  for (int64_t k = 0; k < lanes; ++k)
    sum += double(v[k]);
  return sum;
}

} // namespace tokcredit::cpu
