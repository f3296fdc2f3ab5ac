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
#include <cub/device/device_scan.cuh>
#include <cuda/atomic>

namespace tokcredit::cuda {
namespace {

constexpr const char *op = "tree_build";
constexpr int least_threads = 128, most_threads = 512; // of the block of a group
constexpr int near_rows = 256;                         // of a group that is kept in shared memory
constexpr int64_t few_rows = 2048;                     // are put in order without a sort

// Rows sorted by group, in their order inside it. `place` below is a place in this order inside the group.
struct Places {
  const uint32_t *row;
  const uint32_t *group;
  const int64_t *start; // [groups + 1]
};

// What the group's block finds out about the row at each place.
struct Paths {
  int64_t *owner;  // place of the row that it was compared with last; -1 for a group's first row
  int64_t *depth;  // where it parts from its owner, or ends
  int64_t *next;   // the owner to compare with; the row itself if it owns what it does not share
  int64_t *begin;  // of the row, in the buffer
  int64_t *length; // of the row
  int64_t *token;  // the token by which it parts; while looking for owners
  int64_t *order, *spare;

  static constexpr int arrays = 8;
  __device__ static Paths in(int64_t *memory, int64_t stride) {
    return {memory,
            memory + stride,
            memory + 2 * stride,
            memory + 3 * stride,
            memory + 4 * stride,
            memory + 5 * stride,
            memory + 6 * stride,
            memory + 7 * stride};
  }
};

// The nodes, by place; the last two by row.
struct Numbers {
  int64_t *paths;  // [Paths::arrays * R]
  int64_t *rank;   // how many of its owner's nodes end before the depth at which it parts
  int64_t *above;  // where the node that ends there begins, if the row is the first to name it; else -1
  int64_t *tail;   // where the owned node that ends with the row begins
  int64_t *nodes;  // how many nodes the row owns
  int64_t *offset; // how many nodes the rows before it own
};

__device__ uint32_t group_of(const TreeBuild &b, int64_t r) {
  return uint32_t(min(max(b.group[r], int64_t(0)), b.groups - 1));
}

__global__ void make_keys(TreeBuild b, uint32_t *groups, uint32_t *rows) {
  const int64_t r = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (r < b.rows.count) {
    groups[r] = group_of(b, r);
    rows[r] = uint32_t(r);
  }
}

__global__ void __launch_bounds__(sorting_threads)
    sort_rows(TreeBuild b, int bits, uint32_t *groups, uint32_t *rows, int64_t *starts, unsigned *finished) {
  if (threadIdx.x == 0)
    *finished = 0;
  sort_by_block(
      b.rows.count, bits, [&](int64_t r) { return group_of(b, r); }, groups, rows, starts, b.groups);
}

template <class Token> struct Text {
  const Token *tokens;
  const Paths &paths;

  __device__ Token at(int64_t place, int64_t depth) const { return tokens[paths.begin[place] + depth]; }
  // How far two rows agree that are known to agree before `from`; by a warp.
  __device__ int64_t shared(int64_t one, int64_t other, int64_t from) const {
    const int64_t n = min(paths.length[one], paths.length[other]);
    return from < n ? from + common_prefix(tokens + paths.begin[one] + from,
                                           tokens + paths.begin[other] + from, n - from)
                    : n;
  }
};

// The row at place `i` against the first of its group, by a warp.
template <class Token>
__device__ void compare(const TreeBuild &b, const Numbers &numbers, int64_t i, int64_t row, int64_t first) {
  const Span own = span_of(b.rows, row), other = span_of(b.rows, first);
  const Token *tokens = static_cast<const Token *>(b.tokens);
  const bool is_first = row == first;
  const int64_t depth =
      is_first ? 0
               : common_prefix(tokens + own.begin, tokens + other.begin, min(own.length(), other.length()));
  if (lane_id() != 0)
    return;
  const Paths paths = Paths::in(numbers.paths + i, b.rows.count);
  *paths.owner = is_first ? -1 : 0;
  *paths.depth = depth;
  *paths.next = is_first ? 0 : -1;
  *paths.begin = own.begin;
  *paths.length = own.length();
}

// All rows, a warp each: this is where most shared tokens are.
template <class Token>
__global__ void __launch_bounds__(block_threads) compare_first(TreeBuild b, Places places, Numbers numbers) {
  const int64_t i = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (i < b.rows.count)
    compare<Token>(b, numbers, i, places.row[i], places.row[places.start[places.group[i]]]);
}

// The same, and what sort_rows does: of few rows each finds its place by looking at all others.
template <class Token>
__global__ void __launch_bounds__(block_threads)
    compare_few(TreeBuild b, Numbers numbers, uint32_t *groups, uint32_t *rows, int64_t *starts,
                unsigned *finished) {
  const int64_t r = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32, R = b.rows.count;
  if (r >= R)
    return;
  const uint32_t own = group_of(b, r);
  unsigned place = 0, first = ~0u, start = 0;
#pragma unroll 8
  for (int64_t k = lane_id(); k < R; k += 32) {
    const uint32_t group = group_of(b, k);
    place += group < own || (group == own && k < r);
    first = min(first, group == own ? unsigned(k) : ~0u);
    start += group < r; // rows before those of group r
  }
  place = __reduce_add_sync(all_lanes, place);
  first = __reduce_min_sync(all_lanes, first);
  start = __reduce_add_sync(all_lanes, start);
  if (lane_id() == 0) {
    groups[place] = own;
    rows[place] = uint32_t(r);
    if (r < b.groups)
      starts[r] = start;
    if (r == 0) {
      starts[b.groups] = R;
      *finished = 0;
    }
  }
  compare<Token>(b, numbers, place, r, first);
}

// The sum of `x` over the threads of the block before this one, and over all of them. A barrier for memory.
__device__ unsigned sum_before(unsigned x, unsigned &all) {
  __shared__ unsigned sums[32];
  unsigned upto = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned before = __shfl_sync(all_lanes, upto, max(lane_id() - step, 0));
    upto += lane_id() >= step ? before : 0;
  }
  const int warp = int(threadIdx.x / 32), warps = int(blockDim.x / 32);
  if (lane_id() == 31)
    sums[warp] = upto;
  __syncthreads();
  unsigned before = upto - x;
  all = 0;
  for (int w = 0; w < warps; ++w) {
    before += w < warp ? sums[w] : 0;
    all += sums[w];
  }
  __syncthreads(); // the sums are used again
  return before;
}

// The places of a group in an order, by its block.
struct Order {
  Paths paths;
  bool by_token; // the tokens by which rows part count too

  // Rows that part from the same owner, at the same depth, by the same token are equal but for their place.
  struct Key {
    int64_t owner, depth, token, place;
    __device__ bool before(const Key &o) const {
      return owner != o.owner   ? owner < o.owner
             : depth != o.depth ? depth < o.depth
             : token != o.token ? token < o.token
                                : place < o.place;
    }
  };
  __device__ Key key_of(int64_t place) const {
    return {paths.owner[place], paths.depth[place], by_token ? paths.token[place] : 0, place};
  }
  // How many of list[0, n), which is sorted, come before a key.
  __device__ int64_t count_before(const int64_t *list, int64_t n, const Key &key) const {
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (key_of(list[middle]).before(key))
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  // Sorts paths.order[0, n) by merging runs of twice the width in each pass.
  __device__ void sort(int64_t n) {
    for (int64_t width = 1; width < n; width *= 2) {
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        const int64_t pair = i - i % (2 * width), own = i - i % width;
        const int64_t other = own == pair ? min(pair + width, n) : pair;
        const int64_t place = paths.order[i];
        const int64_t passed =
            count_before(paths.order + other, min(other + width, n) - other, key_of(place));
        paths.spare[pair + (i - own) + passed] = place;
      }
      __syncthreads();
      swap();
    }
  }
  // Leaves of paths.order[0, n) those that are kept, in their order, and returns how many.
  template <class Keep> __device__ int64_t keep(int64_t n, Keep &&kept) {
    int64_t count = 0;
    for (int64_t first = 0; first < n; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      const bool stays = i < n && kept(i);
      unsigned all;
      const unsigned before = sum_before(stays, all);
      if (stays)
        paths.spare[count + before] = paths.order[i];
      count += all;
    }
    __syncthreads();
    swap();
    return count;
  }
  __device__ void swap() {
    int64_t *order = paths.order;
    paths.order = paths.spare;
    paths.spare = order;
  }
};

// Every row's owner. On return all rows of the group are in `order.paths`.
template <class Token> __device__ void find_owners(Order &order, const Token *tokens, int64_t rows) {
  Paths &paths = order.paths;
  const Text<Token> text{tokens, paths};
  const auto keep_parting = [&](int64_t n) {
    return order.keep(n, [&](int64_t i) {
      const int64_t place = paths.order[i];
      const bool parts = paths.next[place] != place && paths.depth[place] < paths.length[place];
      if (parts)
        paths.token[place] = int64_t(text.at(place, paths.depth[place]));
      return parts;
    });
  };
  order.by_token = true;
  int64_t count = keep_parting(rows);
  while (count > 0) {
    order.sort(count);
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      Order::Key first = order.key_of(paths.order[i]);
      first.place = -1;
      paths.next[paths.order[i]] = paths.order[order.count_before(paths.order, count, first)];
    }
    __syncthreads();
    for (int64_t i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
      const int64_t place = paths.order[i], next = paths.next[place];
      if (next == place)
        continue;
      const int64_t depth = text.shared(place, next, paths.depth[place] + 1);
      __syncwarp(); // all lanes have read the old depth
      if (lane_id() == 0) {
        paths.owner[place] = next;
        paths.depth[place] = depth;
      }
    }
    __syncthreads();
    count = keep_parting(count);
  }
}

// Which rows name a node, and where nodes begin. The nodes of an owner end where rows part from it, or end
// inside it, and with itself.
__device__ void find_nodes(Order &order, const Places &places, int64_t first, int64_t rows,
                           const Numbers &numbers) {
  Paths &paths = order.paths;
  order.by_token = false;
  for (int64_t k = threadIdx.x; k < rows; k += blockDim.x)
    paths.order[k] = k;
  __syncthreads();
  order.sort(rows);
  const int64_t named = order.keep(rows, [&](int64_t i) {
    const int64_t place = paths.order[i], owner = paths.owner[place], depth = paths.depth[place];
    if (owner < 0 || depth >= paths.length[owner])
      return false;
    const int64_t before = i > 0 ? paths.order[i - 1] : place;
    return i == 0 || paths.owner[before] != owner || paths.depth[before] != depth;
  });
  const int64_t *names = paths.order;
  // How many named nodes come before one that ends at `depth` of `owner`.
  const auto count = [&](int64_t owner, int64_t depth) {
    return order.count_before(names, named, {owner, depth, 0, -1});
  };
  for (int64_t place = threadIdx.x; place < rows; place += blockDim.x) {
    const int64_t owner = paths.owner[place], depth = paths.depth[place];
    const int64_t low = count(owner, -1), at = count(owner, depth);
    const bool is_name = owner >= 0 && at < named && names[at] == place;
    const int64_t from = count(place, -1), to = count(place + 1, -1);
    numbers.rank[first + place] = at - low;
    numbers.above[first + place] = !is_name ? -1 : paths.depth[at > low ? names[at - 1] : owner];
    numbers.tail[first + place] = paths.depth[to > from ? names[to - 1] : place];
    numbers.nodes[places.row[first + place]] = paths.next[place] == place ? to - from + 1 : 0;
  }
}

// Sums by one block.
__device__ void sum_nodes(const Numbers &numbers, int64_t rows) {
  constexpr int own = 4;
  int64_t count = 0;
  for (int64_t first = 0; first < rows; first += own * int64_t(blockDim.x)) {
    const int64_t r = first + own * int64_t(threadIdx.x);
    unsigned nodes[own], sum = 0, all;
#pragma unroll
    for (int k = 0; k < own; ++k)
      sum += nodes[k] = r + k < rows ? unsigned(numbers.nodes[r + k]) : 0;
    int64_t before = count + sum_before(sum, all);
#pragma unroll
    for (int k = 0; k < own; ++k) {
      if (r + k < rows)
        numbers.offset[r + k] = before;
      before += nodes[k];
    }
    count += all;
  }
}

// The arrays over nodes, by one block from the rows at [from, to) of all places. The nodes of a group are
// written and counted by the block that has its rows.
struct Writer {
  const TreeBuild &b;
  const Places &places;
  const Numbers &numbers;
  const Paths paths;

  __device__ Writer(const TreeBuild &b, const Places &places, const Numbers &numbers)
      : b(b), places(places), numbers(numbers), paths(Paths::in(numbers.paths, b.rows.count)) {}

  __device__ int64_t offset(int64_t i) const { return numbers.offset[places.row[i]]; }
  // The place of the owner among all places.
  __device__ int64_t owner(int64_t i) const { return places.start[places.group[i]] + paths.owner[i]; }
  __device__ bool owns(int64_t i) const { return places.start[places.group[i]] + paths.next[i] == i; }
  // The node of a place's owner that ends where the place parts from it.
  __device__ int64_t parting(int64_t i) const {
    return paths.owner[i] < 0 ? int64_t(-1) : offset(owner(i)) + numbers.rank[i];
  }
  __device__ void write(int64_t v, int64_t owner, int64_t begin, int64_t end) const {
    // Before an owner's first node comes the node at which it parts from its own owner.
    b.parent[v] = v > offset(owner) ? v - 1 : parting(owner);
    b.group_of[v] = places.group[owner];
    b.depth[v] = begin;
    b.length[v] = end - begin;
    b.count[v] = b.degree[v] = 0;
  }
  __device__ void run(int64_t from, int64_t to) const {
    for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) {
      const int64_t r = places.row[i];
      if (numbers.above[i] >= 0)
        write(parting(i), owner(i), numbers.above[i], paths.depth[i]);
      int64_t leaf = parting(i);
      if (owns(i)) {
        leaf = numbers.offset[r] + numbers.nodes[r] - 1;
        write(leaf, i, numbers.tail[i], paths.length[i]);
      }
      b.leaf[r] = leaf;
    }
    __syncthreads();
    // Integer counts: any order adds up to the same.
    const auto add = [](int64_t *p) { atomicAdd(reinterpret_cast<unsigned long long *>(p), 1ull); };
    const auto add_child = [&](int64_t v) {
      if (b.parent[v] >= 0)
        add(b.degree + b.parent[v]);
    };
    for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) {
      const int64_t leaf = b.leaf[places.row[i]];
      if (numbers.above[i] >= 0)
        add_child(parting(i));
      if (owns(i))
        add_child(leaf);
      add(b.degree + leaf);
      for (int64_t v = leaf; v >= 0; v = b.parent[v])
        add(b.count + v);
    }
  }
  // Slots without a node, of which thread `own` of so many has its share.
  __device__ void clear_rest(int64_t own, int64_t threads) const {
    const int64_t R = b.rows.count, size = numbers.offset[R - 1] + numbers.nodes[R - 1];
    for (int64_t v = size + own; v < 2 * R; v += threads) {
      b.parent[v] = -1;
      b.group_of[v] = b.depth[v] = b.length[v] = b.count[v] = b.degree[v] = 0;
    }
    if (own == 0)
      *b.size = size;
  }
};

// A block per group. With `finished`, which counts blocks, the last of them sums the nodes of all rows, and
// writes all nodes if there are few.
template <class Token>
__global__ void __launch_bounds__(most_threads, 1)
    search_groups(TreeBuild b, Places places, Numbers numbers, unsigned *finished) {
  __shared__ int64_t near[Paths::arrays * near_rows];
  __shared__ bool is_last;
  const int64_t first = places.start[blockIdx.x], rows = places.start[blockIdx.x + 1] - first;
  const Paths far = Paths::in(numbers.paths + first, b.rows.count);
  Order order{rows <= near_rows ? Paths::in(near, near_rows) : far, true};
  for (int64_t k = threadIdx.x; k < rows; k += blockDim.x) {
    if (rows <= near_rows) {
      order.paths.owner[k] = far.owner[k];
      order.paths.depth[k] = far.depth[k];
      order.paths.next[k] = far.next[k];
      order.paths.begin[k] = far.begin[k];
      order.paths.length[k] = far.length[k];
    }
    order.paths.order[k] = k;
  }
  __syncthreads();
  find_owners(order, static_cast<const Token *>(b.tokens), rows);
  find_nodes(order, places, first, rows, numbers);
  for (int64_t k = threadIdx.x; rows <= near_rows && k < rows; k += blockDim.x) {
    far.owner[k] = order.paths.owner[k];
    far.depth[k] = order.paths.depth[k];
    far.next[k] = order.paths.next[k];
  }
  if (!finished)
    return;
  __syncthreads();
  if (threadIdx.x == 0) // releases this block's numbers, and acquires the others' if it is the last
    is_last = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(*finished).fetch_add(
                  1u, ::cuda::std::memory_order_acq_rel) +
                  1 ==
              gridDim.x;
  __syncthreads();
  if (!is_last)
    return;
  sum_nodes(numbers, b.rows.count);
  if (b.rows.count > few_rows)
    return;
  __syncthreads();
  const Writer writer(b, places, numbers);
  writer.run(0, b.rows.count);
  writer.clear_rest(threadIdx.x, blockDim.x);
}

// A block per group.
__global__ void __launch_bounds__(most_threads, 1) write_nodes(TreeBuild b, Places places, Numbers numbers) {
  const Writer writer(b, places, numbers);
  writer.run(places.start[blockIdx.x], places.start[blockIdx.x + 1]);
  writer.clear_rest(blockIdx.x * int64_t(blockDim.x) + threadIdx.x, gridDim.x * int64_t(blockDim.x));
}

template <class Token> void build(const TreeBuild &b, Queue &queue) {
  const int64_t R = b.rows.count;
  const bool sorts = R > few_rows, sums = R > most_sorted_by_block;
  uint32_t *groups, *rows;
  int64_t *starts;
  Numbers numbers;
  unsigned *finished;
  allocate_together(queue, Wanted{rows, R}, Wanted{groups, R}, Wanted{starts, b.groups + 1},
                    Wanted{numbers.paths, Paths::arrays * R}, Wanted{numbers.rank, R},
                    Wanted{numbers.above, R}, Wanted{numbers.tail, R}, Wanted{numbers.nodes, R},
                    Wanted{numbers.offset, R}, Wanted{finished, 1});
  Places places{rows, groups, starts};
  const int bits = bits_of(uint64_t(b.groups));
  const int64_t blocks = ceil_div(R, warps_per_block);
  if (sums) {
    launch(op, queue, make_keys, ceil_div(R, block_threads), block_threads, b, groups, rows);
    const auto sorted = sort_pairs<uint32_t, uint32_t>(op, queue, groups, rows, R, bits);
    places = {sorted.values, sorted.keys, starts_of(op, queue, sorted.keys, R, b.groups)};
    finished = nullptr;
  } else if (sorts) {
    launch(op, queue, sort_rows, 1, sorting_threads, b, bits, groups, rows, starts, finished);
  }
  if (sorts)
    launch(op, queue, compare_first<Token>, blocks, block_threads, b, places, numbers);
  else
    launch(op, queue, compare_few<Token>, blocks, block_threads, b, numbers, groups, rows, starts, finished);
  // A warp for each row of most groups.
  int threads = least_threads;
  while (threads < most_threads && threads / 32 < R / b.groups)
    threads *= 2;
  launch(op, queue, search_groups<Token>, b.groups, threads, b, places, numbers, finished);
  if (sums) {
    size_t bytes = 0;
    const auto sum = [&](void *memory) {
      check(cub::DeviceScan::ExclusiveSum(memory, bytes, numbers.nodes, numbers.offset, R, stream_of(queue)),
            op);
    };
    sum(nullptr);
    sum(queue.allocate(int64_t(bytes)));
  }
  if (sorts)
    launch(op, queue, write_nodes, b.groups, threads, b, places, numbers);
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
