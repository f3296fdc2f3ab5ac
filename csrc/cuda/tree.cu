// Radix trees without a dictionary, a block per group.
//
// Rows of a group are compared with an *owner*: first all with the group's first row. A row that parts from
// its owner at depth d is compared further with the first row that parts from the same owner, at the same
// depth, by the same token; that row becomes the owner of everything it does not share with its own owner. So
// every token of a shared prefix is compared once per row, as on the CPU. A row that ends inside its owner's
// path owns nothing.
//
// A node is then a stretch of an owner's path between two depths at which rows part or end: its `end` depth
// names it. The first row that runs through a node is its owner, because owners are the first rows of
// their kind. Hence numbering by first appearance is numbering by (owner, end): a sum over rows of the nodes
// each owns, and a rank inside the owner.
#include "cuda/prefix.cuh"
#include "cuda/sort.cuh"
#include "ops/tree.hpp"
#include <cub/block/block_scan.cuh>
#include <cub/device/device_scan.cuh>
#include <iterator>

namespace tokcredit::cuda {
namespace {

constexpr const char *op = "tree_build";
constexpr int group_threads = 512;

// Rows sorted by group, in their order inside it. `place` below is a place in this order.
struct Places {
  const uint32_t *row;
  const uint32_t *group;
  const int64_t *start; // [groups + 1]
};

// What the group's block finds out about the row at each place.
struct Paths {
  int64_t *owner; // place of the row that it was compared with last; -1 for a group's first row
  int64_t *depth; // where it parts from its owner, or ends
  int64_t *rank;  // how many of its owner's nodes end before that depth
  int64_t *above; // the depth where the node that ends there begins
  int64_t *tail;  // where the owned node that ends with the row begins; unless the row owns nothing
  int64_t *token; // the token by which it parts; while looking for owners
  int64_t *next;  // the owner to compare with; while looking for owners
  int64_t *active;
  bool *owns;
  bool *names; // the first of the rows that part or end at this depth of its owner, short of the owner's end
  int64_t *nodes; // [R] by row: how many nodes it owns
};

__global__ void make_keys(TreeBuild b, uint32_t *groups, uint32_t *rows) {
  const int64_t r = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (r < b.rows.count) {
    groups[r] = uint32_t(min(max(b.group[r], int64_t(0)), b.groups - 1));
    rows[r] = uint32_t(r);
  }
}

template <class Token> struct Text {
  const TreeBuild &b;
  const Places &places;

  __device__ int64_t length(int64_t place) const { return span_of(b.rows, places.row[place]).length(); }
  __device__ const Token *at(int64_t place) const {
    return static_cast<const Token *>(b.tokens) + span_of(b.rows, places.row[place]).begin;
  }
  // How far two rows agree that are known to agree before `from`; by a warp.
  __device__ int64_t shared(int64_t one, int64_t other, int64_t from) const {
    const int64_t n = min(length(one), length(other));
    return from < n ? from + common_prefix(at(one) + from, at(other) + from, n - from) : n;
  }
};

// All rows against the first of their group, a warp each: this is where most shared tokens are.
template <class Token>
__global__ void __launch_bounds__(block_threads) compare_first(TreeBuild b, Places places, Paths paths) {
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= b.rows.count)
    return;
  const int64_t first = places.start[places.group[place]];
  const int64_t depth = place == first ? 0 : Text<Token>{b, places}.shared(place, first, 0);
  if (lane_id() == 0) {
    paths.owner[place] = place == first ? -1 : first;
    paths.depth[place] = depth;
    paths.owns[place] = place == first;
  }
}

// Keeps the places of active[0, count) that part from their owner before they end, in order; returns how
// many.
template <class Token>
__device__ int64_t keep_parting(const Text<Token> &text, const Paths &paths, int64_t *active, int64_t count) {
  using Scan = cub::BlockScan<int, group_threads>;
  __shared__ typename Scan::TempStorage scratch;
  int64_t kept = 0;
  for (int64_t first = 0; first < count; first += group_threads) {
    const int64_t k = first + threadIdx.x, place = k < count ? active[k] : 0;
    const bool parts = k < count && !paths.owns[place] && paths.depth[place] < text.length(place);
    int before, total;
    Scan(scratch).ExclusiveSum(int(parts), before, total);
    if (parts) {
      active[kept + before] = place;
      paths.token[place] = int64_t(text.at(place)[paths.depth[place]]);
    }
    kept += total;
    __syncthreads(); // the scratch is used again, and what was written is read
  }
  return kept;
}

template <class Token>
__global__ void __launch_bounds__(group_threads) find_owners(TreeBuild b, Places places, Paths paths) {
  const int64_t first = places.start[blockIdx.x], last = places.start[blockIdx.x + 1];
  const Text<Token> text{b, places};
  int64_t *active = paths.active + first;
  for (int64_t k = threadIdx.x; k < last - first; k += group_threads)
    active[k] = first + k;
  __syncthreads();
  int64_t count = keep_parting(text, paths, active, last - first);
  while (count > 0) {
    for (int64_t k = threadIdx.x; k < count; k += group_threads) {
      const int64_t place = active[k];
      int64_t j = 0;
      while (paths.owner[active[j]] != paths.owner[place] || paths.depth[active[j]] != paths.depth[place] ||
             paths.token[active[j]] != paths.token[place])
        ++j; // ends at k at the latest
      paths.next[place] = active[j];
    }
    __syncthreads();
    for (int64_t k = threadIdx.x / 32; k < count; k += group_threads / 32) {
      const int64_t place = active[k], next = paths.next[place];
      const int64_t depth = next == place ? 0 : text.shared(place, next, paths.depth[place] + 1);
      __syncwarp(); // all lanes have read the old depth
      if (lane_id() != 0)
        continue;
      if (next == place) {
        paths.owns[place] = true;
      } else {
        paths.owner[place] = next;
        paths.depth[place] = depth;
      }
    }
    __syncthreads();
    count = keep_parting(text, paths, active, count);
  }

  // Which rows name a node, and where nodes begin.
  for (int64_t place = first + threadIdx.x; place < last; place += group_threads) {
    const int64_t owner = paths.owner[place], depth = paths.depth[place];
    bool names = owner >= 0 && depth < text.length(owner);
    for (int64_t j = first; names && j < place; ++j)
      names = paths.owner[j] != owner || paths.depth[j] != depth;
    paths.names[place] = names;
  }
  __syncthreads();
  for (int64_t place = first + threadIdx.x; place < last; place += group_threads) {
    const int64_t owner = paths.owner[place], depth = paths.depth[place];
    int64_t rank = 0, above = owner >= 0 ? (paths.owner[owner] < 0 ? 0 : paths.depth[owner]) : 0;
    int64_t nodes = 0, tail = owner >= 0 ? depth : 0;
    for (int64_t j = first; j < last; ++j) {
      if (!paths.names[j])
        continue;
      if (paths.owner[j] == owner && paths.depth[j] < depth) {
        ++rank;
        above = max(above, paths.depth[j]);
      }
      if (paths.owner[j] == place) {
        ++nodes;
        tail = max(tail, paths.depth[j]);
      }
    }
    paths.rank[place] = rank;
    paths.above[place] = above;
    paths.tail[place] = tail;
    paths.nodes[places.row[place]] = paths.owns[place] ? nodes + 1 : 0;
  }
}

template <class Token>
__global__ void __launch_bounds__(block_threads)
    write_nodes(TreeBuild b, Places places, Paths paths, const int64_t *offset) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, R = b.rows.count;
  const Text<Token> text{b, places};
  const int64_t size = offset[R - 1] + paths.nodes[R - 1];
  // The node of a place's owner that ends where the place parts from it.
  const auto parting = [&](int64_t place) {
    const int64_t owner = paths.owner[place];
    return owner < 0 ? int64_t(-1) : offset[places.row[owner]] + paths.rank[place];
  };
  const auto write = [&](int64_t v, int64_t place, int64_t owner, int64_t begin, int64_t end) {
    // Before an owner's first node comes the node at which it parts from its own owner.
    b.parent[v] = v > offset[places.row[owner]] ? v - 1 : parting(owner);
    b.group_of[v] = places.group[place];
    b.depth[v] = begin;
    b.length[v] = end - begin;
  };
  if (i < R) {
    const int64_t r = places.row[i];
    if (paths.names[i])
      write(parting(i), i, paths.owner[i], paths.above[i], paths.depth[i]);
    int64_t leaf = parting(i);
    if (paths.owns[i]) {
      leaf = offset[r] + paths.nodes[r] - 1;
      write(leaf, i, i, paths.tail[i], text.length(i));
    }
    b.leaf[r] = leaf;
  }
  if (i < 2 * R)
    b.count[i] = b.degree[i] = 0; // counted by the next kernel
  if (i >= size && i < 2 * R) {
    b.parent[i] = -1;
    b.group_of[i] = b.depth[i] = b.length[i] = 0;
  }
  if (i == 0)
    *b.size = size;
}

// Integer counts: any order adds up to the same.
__global__ void __launch_bounds__(block_threads) count_rows(TreeBuild b) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  const auto add = [](int64_t *p) { atomicAdd(reinterpret_cast<unsigned long long *>(p), 1ull); };
  if (i < b.rows.count) {
    add(b.degree + b.leaf[i]);
    for (int64_t v = b.leaf[i]; v >= 0; v = b.parent[v])
      add(b.count + v);
  }
  if (i < *b.size && b.parent[i] >= 0)
    add(b.degree + b.parent[i]);
}

template <class Token> void build(const TreeBuild &b, Queue &queue) {
  const int64_t R = b.rows.count, blocks = ceil_div(R, block_threads);
  uint32_t *groups = queue.allocate_array<uint32_t>(R), *rows = queue.allocate_array<uint32_t>(R);
  launch(op, queue, make_keys, blocks, block_threads, b, groups, rows);
  const auto sorted = sort_pairs(op, queue, static_cast<const uint32_t *>(groups),
                                 static_cast<const uint32_t *>(rows), R, bits_of(uint64_t(b.groups)));
  const Places places{sorted.values, sorted.keys, starts_of(op, queue, sorted.keys, R, b.groups)};
  Paths paths;
  int64_t *offset;
  int64_t **const numbers[] = {&paths.owner, &paths.depth, &paths.rank,   &paths.above, &paths.tail,
                               &paths.token, &paths.next,  &paths.active, &paths.nodes, &offset};
  int64_t *scratch = queue.allocate_array<int64_t>(R * int64_t(std::size(numbers)));
  for (int64_t **array : numbers) {
    *array = scratch;
    scratch += R;
  }
  paths.owns = queue.allocate_array<bool>(2 * R);
  paths.names = paths.owns + R;
  launch(op, queue, compare_first<Token>, ceil_div(R, warps_per_block), block_threads, b, places, paths);
  launch(op, queue, find_owners<Token>, b.groups, group_threads, b, places, paths);

  size_t bytes = 0;
  const auto sum = [&](void *memory) {
    check(cub::DeviceScan::ExclusiveSum(memory, bytes, paths.nodes, offset, R, stream_of(queue)), op);
  };
  sum(nullptr);
  sum(queue.allocate(int64_t(bytes)));
  launch(op, queue, write_nodes<Token>, ceil_div(2 * R, block_threads), block_threads, b, places, paths,
         offset);
  launch(op, queue, count_rows, ceil_div(2 * R, block_threads), block_threads, b);
}

} // namespace

void tree_build(const TreeBuild &b, Queue &queue) {
  check_fits(op, "rows", b.rows.count);
  if (b.groups < 1 || b.groups > b.rows.count)
    throw std::invalid_argument(std::string(op) + ": groups: expected 1 to the number of rows, got " +
                                std::to_string(b.groups));
  b.type == Type::i32 ? build<int32_t>(b, queue) : build<int64_t>(b, queue);
}

} // namespace tokcredit::cuda
