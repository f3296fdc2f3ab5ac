// From the leaves to the roots, in the order of the CPU: to a node come first the rows that end there, then
// its children from the last number to the first. Sorting rows and children by where they go gives each node
// its list; the thread that finishes a node's last child goes on with the node.
#include "cuda/sort.cuh"
#include "math/mean.hpp"
#include "ops/tree.hpp"
#include <cuda/atomic>

namespace tokcredit::cuda {
namespace {

struct Forest {
  const int64_t *leaf, *parent;
  int64_t rows, capacity;
};

template <class T> struct Scaled {
  using Sum = double;
  const T *x, *scale;
  T *y;

  __device__ void add(Sum &sum, int64_t row) const { sum += double(x[row]); }
  __device__ void merge(Sum &sum, const Sum &child) const { sum += child; }
  __device__ void finish(Sum &sum, int64_t v) const {
    if (scale)
      sum *= double(scale[v]);
    y[v] = T(sum);
  }
};

template <class T> struct Average {
  using Sum = Mean;
  const T *x;
  const bool *counts;
  double *y;

  __device__ void add(Sum &sum, int64_t row) const {
    if (!counts || counts[row])
      sum.add(double(x[row]));
  }
  __device__ void merge(Sum &sum, const Sum &child) const { sum.merge(child); }
  __device__ void finish(Sum &sum, int64_t v) const { y[v] = sum.value(); }
};

// Items: rows, then nodes from the last to the first. An item's key is the node it goes to, or V for none.
__global__ void make_items(Forest f, uint32_t *keys, uint32_t *items) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, R = f.rows, V = f.capacity;
  if (i >= R + V)
    return;
  const int64_t to = i < R ? f.leaf[i] : f.parent[R + V - 1 - i];
  keys[i] = uint32_t(to < 0 || to >= V ? V : to);
  items[i] = uint32_t(i);
}

template <class Body>
__global__ void __launch_bounds__(block_threads)
    fold(Forest f, Body body, const uint32_t *items, const int64_t *starts, typename Body::Sum *sums,
         unsigned *finished) {
  const int64_t R = f.rows, V = f.capacity;
  int64_t v = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  // Rows come before children in a node's list, so one look at its end tells a node without children.
  if (v >= V || (starts[v] < starts[v + 1] && items[starts[v + 1] - 1] >= R))
    return;
  while (v >= 0) {
    typename Body::Sum sum{};
    for (int64_t k = starts[v]; k < starts[v + 1]; ++k)
      items[k] < R ? body.add(sum, items[k]) : body.merge(sum, sums[R + V - 1 - items[k]]);
    body.finish(sum, v);
    sums[v] = sum;
    v = f.parent[v];
    if (v < 0 || v >= V)
      return;
    unsigned children = 0;
    for (int64_t k = starts[v + 1]; k-- > starts[v] && items[k] >= R;)
      ++children;
    // Releases this node's sum, and acquires those of its siblings if it is the last.
    const unsigned before = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(finished[v])
                                .fetch_add(1u, ::cuda::std::memory_order_acq_rel);
    if (before + 1 != children)
      return;
  }
}

template <class Body> void fold_all(const char *op, const Forest &f, const Body &body, Queue &queue) {
  const int64_t V = f.capacity, items = f.rows + V;
  check_fits(op, "rows and nodes", items);
  uint32_t *keys = queue.allocate_array<uint32_t>(items), *made = queue.allocate_array<uint32_t>(items);
  launch(op, queue, make_items, ceil_div(items, block_threads), block_threads, f, keys, made);
  const auto sorted = sort_pairs(op, queue, static_cast<const uint32_t *>(keys),
                                 static_cast<const uint32_t *>(made), items, bits_of(uint64_t(V)));
  const int64_t *starts = starts_of(op, queue, sorted.keys, items, V);
  auto *sums = queue.allocate_array<typename Body::Sum>(V);
  unsigned *finished = queue.allocate_array<unsigned>(V);
  clear(op, queue, finished, V * int64_t(sizeof *finished));
  launch(op, queue, fold<Body>, ceil_div(V, block_threads), block_threads, f, body, sorted.values, starts,
         sums, finished);
}

// A parent's mean is taken away; a root has 0.
__global__ void subtract_parents(const int64_t *parent, const double *mean, double *y, int64_t nodes) {
  const int64_t v = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (v < nodes)
    y[v] = parent[v] < 0 || parent[v] >= nodes ? 0 : mean[v] - mean[parent[v]];
}

template <class T> void fold_scaled(const TreeFold &f, Queue &queue) {
  const Scaled<T> body{static_cast<const T *>(f.x), static_cast<const T *>(f.scale), static_cast<T *>(f.y)};
  fold_all("tree_fold", {f.leaf, f.parent, f.rows, f.capacity}, body, queue);
}

template <class T> void fold_average(const TreeMean &f, double *y, Queue &queue) {
  const Average<T> body{static_cast<const T *>(f.x), f.counts, y};
  fold_all("tree_mean", {f.leaf, f.parent, f.rows, f.capacity}, body, queue);
}

} // namespace

void tree_fold(const TreeFold &f, Queue &queue) {
  f.type == Type::f64 ? fold_scaled<double>(f, queue) : fold_scaled<float>(f, queue);
}

void tree_mean(const TreeMean &f, Queue &queue) {
  double *mean = f.change ? queue.allocate_array<double>(f.capacity) : f.y;
  f.type == Type::f64 ? fold_average<double>(f, mean, queue) : fold_average<float>(f, mean, queue);
  if (f.change)
    launch("tree_mean", queue, subtract_parents, ceil_div(f.capacity, block_threads), block_threads, f.parent,
           static_cast<const double *>(mean), f.y, f.capacity);
}

} // namespace tokcredit::cuda
