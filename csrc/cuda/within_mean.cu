// Tokens sorted by value, running sums of the sorted values, and the first place where their mean exceeds the
// budget. What takes no part has the key of NaN, which comes last.
#include "cuda/sort.cuh"
#include "math/order.hpp"
#include "ops/scan.hpp"
#include "ops/select.hpp"

namespace tokcredit::cuda {
namespace {

constexpr uint64_t none = ~uint64_t(0);

struct Search {
  int64_t span[2];   // all sorted tokens, as one row
  int64_t first_out; // the first place where the mean exceeds the budget
};

__global__ void begin_search(int64_t size, uint64_t *keys, uint32_t *tokens, Search *search) {
  const int64_t t = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (t < size) {
    keys[t] = none;
    tokens[t] = uint32_t(t);
  }
  if (t == 0)
    *search = {{0, size}, size};
}

template <class T>
__global__ void __launch_bounds__(block_threads) make_keys(WithinMean w, int64_t tiles, uint64_t *keys) {
  const T *x = static_cast<const T *>(w.x);
  const int64_t place = blockIdx.x * int64_t(warps_per_block) + threadIdx.x / 32;
  if (place >= tiles)
    return;
  const int64_t from = place * tile_size;
  each_piece<false>(
      w.rows, from, min(from + tile_size, w.rows.size),
      [&](int64_t, int64_t first, int64_t last, bool, bool) {
        for (int64_t t = first + lane_id(); t < last; t += 32)
          if (!w.rows.mask || w.rows.mask[t])
            keys[t] = order_key(double(x[t]));
      },
      [](int64_t, int64_t) {});
}

__global__ void make_values(const uint64_t *keys, int64_t size, double *values) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < size)
    values[i] = number_of(keys[i]);
}

// By one thread: the mean of the smallest tokens grows with their number.
__global__ void find_first_out(WithinMean w, const double *sums, Search *search) {
  int64_t low = 0, high = w.rows.size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sums[middle] / double(middle + 1) <= w.budget)
      low = middle + 1;
    else
      high = middle;
  }
  search->first_out = low;
}

__global__ void choose_tokens(WithinMean w, const uint64_t *keys, const uint32_t *tokens,
                              const Search *search) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < w.rows.size)
    w.chosen[tokens[i]] = keys[i] != none && (i < search->first_out || i < w.least);
}

} // namespace

void within_mean(const WithinMean &w, Queue &queue) {
  const char *op = "within_mean";
  const int64_t size = w.rows.size, blocks = ceil_div(size, block_threads), tiles = tiles_of(size);
  check_fits(op, "tokens", size);
  if (size == 0)
    return;
  uint64_t *keys = queue.allocate_array<uint64_t>(size);
  uint32_t *tokens = queue.allocate_array<uint32_t>(size);
  double *values = queue.allocate_array<double>(size), *sums = queue.allocate_array<double>(size),
         *last = queue.allocate_array<double>(1);
  Search *search = queue.allocate_array<Search>(1);
  launch(op, queue, begin_search, blocks, block_threads, size, keys, tokens, search);
  launch(op, queue, w.type == Type::f64 ? make_keys<double> : make_keys<float>,
         ceil_div(tiles, warps_per_block), block_threads, w, tiles, keys);
  const auto sorted = sort_pairs(op, queue, static_cast<const uint64_t *>(keys),
                                 static_cast<const uint32_t *>(tokens), size, 64);
  launch(op, queue, make_values, blocks, block_threads, sorted.keys, size, values);
  const Rows all{search->span, search->span + 1, nullptr, 1, size};
  scan({all, Type::f64, values, nullptr, sums, last, 1.0, false, false}, queue);
  launch(op, queue, find_first_out, 1, 1, w, sums, search);
  launch(op, queue, choose_tokens, blocks, block_threads, w, sorted.keys, sorted.values, search);
}

} // namespace tokcredit::cuda
