// Rows sorted by value, then stably by scope, so that each scope's are together in descending order; then one
// thread per scope walks its rows. A scope is a group of rollouts: few rows.
#include "cuda/sort.cuh"
#include "math/order.hpp"
#include "math/quota.hpp"
#include "math/variance.hpp"
#include "ops/select.hpp"

namespace tokcredit::cuda {
namespace {

__global__ void by_value(MaximumVariance m, uint64_t *keys, uint32_t *rows) {
  const int64_t r = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (r < m.rows) {
    keys[r] = ~order_key(m.x[r]);
    rows[r] = uint32_t(r);
  }
}

__global__ void by_scope(MaximumVariance m, const uint32_t *rows, uint32_t *keys) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < m.rows) {
    const int64_t g = m.scope[rows[i]];
    keys[i] = uint32_t(g >= 0 && g < m.scopes ? g : m.scopes);
  }
}

__global__ void choose(MaximumVariance m, const uint32_t *rows, const int64_t *starts) {
  const int64_t g = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (g >= m.scopes)
    return;
  const uint32_t *row = rows + starts[g];
  const int64_t size = starts[g + 1] - starts[g], keep = min(wanted_of(m.wanted, g, size), size);
  if (keep <= 0)
    return;
  const int64_t best = most_varied(size, keep, m.largest, [&](int64_t i) { return m.x[row[i]]; });
  for (int64_t i = 0; i < size; ++i)
    m.chosen[row[i]] = i < best || i >= size - (keep - best);
}

} // namespace

void maximum_variance(const MaximumVariance &m, Queue &queue) {
  const char *op = "maximum_variance";
  check_fits(op, "rows", m.rows);
  check_fits(op, "scopes", m.scopes);
  if (m.rows == 0)
    return;
  clear(op, queue, m.chosen, m.rows);
  uint64_t *values = queue.allocate_array<uint64_t>(m.rows);
  uint32_t *scopes = queue.allocate_array<uint32_t>(m.rows), *rows = queue.allocate_array<uint32_t>(m.rows);
  const int64_t blocks = ceil_div(m.rows, block_threads);
  launch(op, queue, by_value, blocks, block_threads, m, values, rows);
  const uint32_t *descending = sort_pairs(op, queue, static_cast<const uint64_t *>(values),
                                          static_cast<const uint32_t *>(rows), m.rows, 64)
                                   .values;
  launch(op, queue, by_scope, blocks, block_threads, m, descending, scopes);
  const auto grouped = sort_pairs(op, queue, static_cast<const uint32_t *>(scopes), descending, m.rows,
                                  bits_of(uint64_t(m.scopes)));
  const int64_t *starts = starts_of(op, queue, grouped.keys, m.rows, m.scopes);
  launch(op, queue, choose, ceil_div(m.scopes, block_threads), block_threads, m, grouped.values, starts);
}

} // namespace tokcredit::cuda
