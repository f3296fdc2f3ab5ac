// From the leaves to the roots, in the order of the CPU: to a node come first the rows that end there, then
// its children from the last number to the first. Sorting rows and children by where they go gives each node
// its list; the thread that finishes a node's last child goes on with the node. Few nodes take one block.
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

// Items are rows, then nodes from the last to the first. An item's key is the node it goes to, or V for none.
struct Lists {
  const uint32_t *items;
  const int64_t *starts;
  unsigned *finished; // children of each node that are
};

template <class T> struct Scaled {
  using Sum = double;
  const T *x, *scale;
  T *y;

  __device__ void add(Sum &sum, int64_t row) const { sum += double(x[row]); }
  __device__ void merge(Sum &sum, const Sum &child) const { sum += child; }
  __device__ void finish(Sum &sum, int64_t v, bool) const {
    if (scale)
      sum *= double(scale[v]);
    y[v] = T(sum);
  }
  __device__ void finish_child(const Sum &, int64_t, const Sum &) const {}
};

template <class T> struct Average {
  using Sum = Mean;
  const T *x;
  const bool *counts;
  T *y;
  bool change;

  __device__ void add(Sum &sum, int64_t row) const {
    if (!counts || counts[row])
      sum.add(double(x[row]));
  }
  __device__ void merge(Sum &sum, const Sum &child) const { sum.merge(child); }
  // A change from the parent's mean is known with the parent.
  __device__ void finish(const Sum &sum, int64_t v, bool is_root) const {
    if (!change || is_root)
      y[v] = T(change ? 0 : sum.value());
  }
  __device__ void finish_child(const Sum &child, int64_t v, const Sum &sum) const {
    if (change)
      y[v] = T(child.value() - sum.value());
  }
};

__device__ uint32_t key_of(const Forest &f, int64_t i) {
  const int64_t R = f.rows, V = f.capacity;
  const int64_t to = i < R ? f.leaf[i] : f.parent[R + V - 1 - i];
  return uint32_t(to < 0 || to >= V ? V : to);
}

__global__ void make_items(Forest f, uint32_t *keys, uint32_t *items, unsigned *finished) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= f.rows + f.capacity)
    return;
  keys[i] = key_of(f, i);
  items[i] = uint32_t(i);
  if (i < f.capacity)
    finished[i] = 0;
}

// Goes up from node v, if it has no children, as far as this thread is the last to come.
template <::cuda::thread_scope scope, class Body>
__device__ void climb(const Forest &f, const Body &body, const Lists &lists, typename Body::Sum *sums,
                      int64_t v) {
  const int64_t R = f.rows, V = f.capacity;
  const uint32_t *items = lists.items;
  // Rows come before children in a node's list, so one look at its end tells a node without children.
  if (lists.starts[v] < lists.starts[v + 1] && items[lists.starts[v + 1] - 1] >= R)
    return;
  while (v >= 0) {
    const int64_t first = lists.starts[v], last = lists.starts[v + 1], parent = f.parent[v];
    const bool is_root = parent < 0 || parent >= V;
    typename Body::Sum sum{};
    int64_t k = first;
    for (; k < last && items[k] < R; ++k)
      body.add(sum, items[k]);
    const int64_t children = k;
    for (; k < last; ++k)
      body.merge(sum, sums[R + V - 1 - items[k]]);
    body.finish(sum, v, is_root);
    for (k = children; k < last; ++k)
      body.finish_child(sums[R + V - 1 - items[k]], R + V - 1 - items[k], sum);
    if (is_root)
      return;
    sums[v] = sum;
    v = parent;
    unsigned siblings = 0;
    for (k = lists.starts[v + 1]; k-- > lists.starts[v] && items[k] >= R;)
      ++siblings;
    // Releases this node's sum, and acquires those of its siblings if it is the last.
    const unsigned before = ::cuda::atomic_ref<unsigned, scope>(lists.finished[v])
                                .fetch_add(1u, ::cuda::std::memory_order_acq_rel);
    if (before + 1 != siblings)
      return;
  }
}

template <class Body>
__global__ void __launch_bounds__(block_threads)
    fold(Forest f, Body body, Lists lists, typename Body::Sum *sums) {
  const int64_t v = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (v < f.capacity)
    climb<::cuda::thread_scope_device>(f, body, lists, sums, v);
}

template <class Body>
__global__ void __launch_bounds__(sorting_threads)
    fold_by_block(Forest f, Body body, int bits, uint32_t *keys, uint32_t *items, int64_t *starts,
                  unsigned *finished, typename Body::Sum *sums) {
  for (int64_t v = threadIdx.x; v < f.capacity; v += sorting_threads)
    finished[v] = 0;
  sort_by_block(
      f.rows + f.capacity, bits, [&](int64_t i) { return key_of(f, i); }, keys, items, starts, f.capacity);
  for (int64_t v = threadIdx.x; v < f.capacity; v += sorting_threads)
    climb<::cuda::thread_scope_block>(f, body, {items, starts, finished}, sums, v);
}

template <class Body> void fold_all(const char *op, const Forest &f, const Body &body, Queue &queue) {
  const int64_t V = f.capacity, size = f.rows + V;
  const int bits = bits_of(uint64_t(V));
  check_fits(op, "rows and nodes", size);
  uint32_t *keys, *items;
  int64_t *starts;
  unsigned *finished;
  typename Body::Sum *sums;
  allocate_together(queue, Wanted{keys, size}, Wanted{items, size}, Wanted{starts, V + 1},
                    Wanted{finished, V}, Wanted{sums, V});
  if (size <= most_sorted_by_block) {
    launch(op, queue, fold_by_block<Body>, 1, sorting_threads, f, body, bits, keys, items, starts, finished,
           sums);
    return;
  }
  launch(op, queue, make_items, ceil_div(size, block_threads), block_threads, f, keys, items, finished);
  const auto sorted = sort_pairs<uint32_t, uint32_t>(op, queue, keys, items, size, bits);
  const Lists lists{sorted.values, starts_of(op, queue, sorted.keys, size, V), finished};
  launch(op, queue, fold<Body>, ceil_div(V, block_threads), block_threads, f, body, lists, sums);
}

template <class T> void fold_scaled(const TreeFold &f, Queue &queue) {
  const Scaled<T> body{static_cast<const T *>(f.x), static_cast<const T *>(f.scale), static_cast<T *>(f.y)};
  fold_all("tree_fold", {f.leaf, f.parent, f.rows, f.capacity}, body, queue);
}

template <class T> void fold_average(const TreeMean &f, Queue &queue) {
  const Average<T> body{static_cast<const T *>(f.x), f.counts, static_cast<T *>(f.y), f.change};
  fold_all("tree_mean", {f.leaf, f.parent, f.rows, f.capacity}, body, queue);
}

} // namespace

void tree_fold(const TreeFold &f, Queue &queue) {
  f.type == Type::f64 ? fold_scaled<double>(f, queue) : fold_scaled<float>(f, queue);
}

void tree_mean(const TreeMean &f, Queue &queue) {
  f.type == Type::f64 ? fold_average<double>(f, queue) : fold_average<float>(f, queue);
}

} // namespace tokcredit::cuda
