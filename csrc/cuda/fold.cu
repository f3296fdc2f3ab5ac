// From the leaves to the roots, in the order of the CPU: to a node come first the rows that end there, then
// its children from the last number to the first. Sorting rows and children by where they go gives each node
// its list; the thread that finishes a node's last child goes on with the node.
#include "cuda/sort.cuh"
#include "ops/tree.hpp"
#include <cuda/atomic>

namespace tokcredit::cuda {
namespace {

constexpr const char *op = "tree_fold";

// Items: rows, then nodes from the last to the first. An item's key is the node it goes to, or V for none.
__global__ void make_items(TreeFold f, uint32_t *keys, uint32_t *items) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, R = f.rows, V = f.capacity;
  if (i >= R + V)
    return;
  const int64_t to = i < R ? f.leaf[i] : f.parent[R + V - 1 - i];
  keys[i] = uint32_t(to < 0 || to >= V ? V : to);
  items[i] = uint32_t(i);
}

template <class T>
__global__ void __launch_bounds__(block_threads)
    fold(TreeFold f, const uint32_t *items, const int64_t *starts, double *sums, unsigned *finished) {
  const T *x = static_cast<const T *>(f.x), *scale = static_cast<const T *>(f.scale);
  T *y = static_cast<T *>(f.y);
  const int64_t R = f.rows, V = f.capacity;
  int64_t v = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  // Rows come before children in a node's list, so one look at its end tells a node without children.
  if (v >= V || (starts[v] < starts[v + 1] && items[starts[v + 1] - 1] >= R))
    return;
  while (v >= 0) {
    double sum = 0;
    for (int64_t k = starts[v]; k < starts[v + 1]; ++k)
      sum += items[k] < R ? double(x[items[k]]) : sums[R + V - 1 - items[k]];
    if (scale)
      sum *= double(scale[v]);
    sums[v] = sum;
    y[v] = T(sum);
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

} // namespace

void tree_fold(const TreeFold &f, Queue &queue) {
  const int64_t V = f.capacity, items = f.rows + V;
  check_fits(op, "rows and nodes", items);
  uint32_t *keys = queue.allocate_array<uint32_t>(items), *made = queue.allocate_array<uint32_t>(items);
  launch(op, queue, make_items, ceil_div(items, block_threads), block_threads, f, keys, made);
  const auto sorted = sort_pairs(op, queue, static_cast<const uint32_t *>(keys),
                                 static_cast<const uint32_t *>(made), items, bits_of(uint64_t(V)));
  const int64_t *starts = starts_of(op, queue, sorted.keys, items, V);
  double *sums = queue.allocate_array<double>(V);
  unsigned *finished = queue.allocate_array<unsigned>(V);
  clear(op, queue, finished, V * int64_t(sizeof *finished));
  launch(op, queue, f.type == Type::f64 ? fold<double> : fold<float>, ceil_div(V, block_threads),
         block_threads, f, sorted.values, starts, sums, finished);
}

} // namespace tokcredit::cuda
