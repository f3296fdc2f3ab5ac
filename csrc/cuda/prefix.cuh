// The common prefix of two token sequences, found by a warp.
#pragma once
#include "cuda/tile.cuh"

namespace tokcredit::cuda {

template <class Token, int width> struct alignas(sizeof(Token) * width) Tokens {
  Token item[width];
};

// Compares whole chunks from `at` on, several loads in flight, and moves `at` to the first difference (true)
// or to the end of the last whole chunk (false).
template <int width, class Token>
__device__ bool differ(const Token *a, const Token *b, int64_t n, int64_t &at) {
  constexpr int loads = 4, chunk = 32 * width * loads;
  using Load = Tokens<Token, width>;
  for (; at + chunk <= n; at += chunk) {
    Load left[loads], right[loads];
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      left[u] = *reinterpret_cast<const Load *>(a + at + (u * 32 + lane_id()) * width);
      right[u] = *reinterpret_cast<const Load *>(b + at + (u * 32 + lane_id()) * width);
    }
    unsigned first = chunk;
#pragma unroll
    for (int u = loads - 1; u >= 0; --u)
#pragma unroll
      for (int k = width - 1; k >= 0; --k)
        if (left[u].item[k] != right[u].item[k])
          first = unsigned((u * 32 + lane_id()) * width + k);
    first = __reduce_min_sync(all_lanes, first);
    if (first < chunk) {
      at += first;
      return true;
    }
  }
  return false;
}

// Token by token, a warp at once, from `at` to `n`.
template <class Token> __device__ bool differ_singly(const Token *a, const Token *b, int64_t n, int64_t &at) {
  for (; at < n; at += 32) {
    const int64_t t = at + lane_id();
    const unsigned different = __ballot_sync(all_lanes, t < n && a[t] != b[t]);
    if (different) {
      at += __ffs(int(different)) - 1;
      return true;
    }
  }
  at = n;
  return false;
}

// The first of [0, n) where a and b differ, or n.
template <class Token> __device__ int64_t common_prefix(const Token *a, const Token *b, int64_t n) {
  constexpr int width = 16 / sizeof(Token);
  const uint64_t place = reinterpret_cast<uintptr_t>(a), other = reinterpret_cast<uintptr_t>(b);
  int64_t at = 0;
  if ((place - other) % 16 == 0) {
    const int64_t head = int64_t((16 - place % 16) % 16 / sizeof(Token));
    if (differ_singly(a, b, min(head, n), at) || differ<width>(a, b, n, at))
      return at;
  } else if (differ<1>(a, b, n, at)) {
    return at;
  }
  differ_singly(a, b, n, at);
  return at;
}

} // namespace tokcredit::cuda
