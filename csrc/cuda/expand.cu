// Run-length decoding: a team of threads per row, or per slice of a row when rows are few, walks the leaf's
// path and writes each run with stores of 16 bytes.
#include "cuda/tile.cuh"
#include "ops/tree.hpp"

namespace tokcredit::cuda {
namespace {

template <class T> __device__ T plus(T a, T b) { return a + b; }
template <> __device__ bool plus(bool a, bool b) { return a || b; }

template <class T> struct alignas(16) Pack {
  static constexpr int width = 16 / sizeof(T);
  T item[width];
};

// Which of the tokens of a pack are kept.
template <int width> struct Kept {
  bool item[width];

  __device__ Kept(const Rows &rows, bool masked, int64_t t) {
    if (width == quad && masked) {
      const Quad<bool> four = load_quad(rows.mask, t, rows.size, t % quad == 0 && quads_aligned(rows.mask));
#pragma unroll
      for (int k = 0; k < width; ++k)
        item[k] = four.item[k % quad];
      return;
    }
#pragma unroll
    for (int k = 0; k < width; ++k)
      item[k] = !masked || rows.mask[t + k];
  }
};

// One row's run, or the padding after a row, as the members of a team write it.
template <class T, int team> struct Run {
  const Rows &rows;
  T *y;
  int64_t low, high; // the slice: nothing outside it is written

  // y[first, last) = value, with `head` added at `first` when `headed`; 0 where masked.
  __device__ void fill(int64_t first, int64_t last, bool masked, T value, T head, bool headed) const {
    constexpr int width = Pack<T>::width;
    const int me = int(threadIdx.x % team);
    const int64_t from = max(first, low), to = min(last, high);
    const auto at = [&](int64_t t) { return headed && t == first ? plus(value, head) : value; };
    const auto one = [&](int64_t t) { y[t] = !masked || rows.mask[t] ? at(t) : T{}; };
    // Up to the first aligned address, then whole packs, then what is left.
    const int64_t offset = int64_t(reinterpret_cast<uintptr_t>(y + from) % 16 / sizeof(T));
    const int64_t body = min(to, from + (offset ? width - offset : 0));
    const int64_t packs = max(to - body, int64_t(0)) / width;
    for (int64_t t = from + me; t < body; t += team)
      one(t);
    for (int64_t p = me; p < packs; p += team) {
      const int64_t t = body + p * width;
      const Kept<width> kept(rows, masked, t);
      Pack<T> pack;
#pragma unroll
      for (int k = 0; k < width; ++k)
        pack.item[k] = kept.item[k] ? at(t + k) : T{};
      *reinterpret_cast<Pack<T> *>(y + t) = pack;
    }
    for (int64_t t = body + packs * width + me; t < to; t += team)
      one(t);
  }
};

template <class T, int team>
__global__ void __launch_bounds__(block_threads) expand_rows(Expand e, int64_t slices) {
  const T *row = static_cast<const T *>(e.row), *body = static_cast<const T *>(e.body),
          *head = static_cast<const T *>(e.head);
  T *y = static_cast<T *>(e.y);
  const int64_t work = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / team, r = work / slices;
  if (r >= e.rows.count)
    return;
  const auto [begin, end] = span_of(e.rows, r);
  const int64_t slice = work % slices;
  // A row and the padding after it, up to the next row; the padding before the first row is its own.
  const int64_t from = r == 0 ? 0 : begin;
  const int64_t to = r + 1 < e.rows.count ? span_of(e.rows, r + 1).begin : e.rows.size;
  const int64_t share = ceil_div(ceil_div(to - from, slices), 16) * 16;
  const Run<T, team> run{e.rows, y, min(to, from + slice * share), min(to, from + (slice + 1) * share)};
  const bool masked = e.rows.mask != nullptr;
  const T base = row ? row[r] : T{};
  int64_t last = end;
  if (!e.leaf)
    run.fill(begin, end, masked, base, T{}, false);
  else
    for (int64_t v = e.leaf[r]; v >= 0 && v < e.nodes && last > max(begin, run.low); v = e.parent[v]) {
      const int64_t first = begin + max(e.depth[v], int64_t(0));
      if (first >= last) // no tree: a node begins before its children
        break;
      if (first < run.high)
        run.fill(first, last, masked, body ? plus(base, body[v]) : base, head ? head[v] : T{},
                 head != nullptr);
      last = first;
    }
  run.fill(from, begin, false, T{}, T{}, false);
  run.fill(end, to, false, T{}, T{}, false);
}

template <class T> void expand_as(const Expand &e, Queue &queue) {
  // Short rows take a warp each; few long ones are sliced, so that the whole device writes.
  const int64_t mean = e.rows.size / (e.rows.count ? e.rows.count : 1);
  int64_t slices = 1;
  while (e.rows.count * slices < 2048 && mean / slices > 4096)
    slices *= 2;
  const int64_t teams = e.rows.count * slices;
  if (mean / slices < 1024)
    launch("expand", queue, expand_rows<T, 32>, ceil_div(teams, warps_per_block), block_threads, e, slices);
  else
    launch("expand", queue, expand_rows<T, block_threads>, teams, block_threads, e, slices);
}

} // namespace

void expand(const Expand &e, Queue &queue) {
  switch (e.type) {
  case Type::f64:
    return expand_as<double>(e, queue);
  case Type::i64:
    return expand_as<int64_t>(e, queue);
  case Type::b8:
    return expand_as<bool>(e, queue);
  default:
    return expand_as<float>(e, queue);
  }
}

} // namespace tokcredit::cuda
