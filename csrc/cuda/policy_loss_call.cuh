// The operands of the policy loss: what is the same for all tokens of a call, and for those of a row.
#pragma once
#include "cuda/tile.cuh"
#include "math/surrogate.hpp"
#include <algorithm>
#include <limits>

namespace tokcredit::cuda {

__host__ __device__ inline bool per_token(const Operand &o) { return o.data && o.per == Per::token; }

// An operand that is the same along a row; of one per token nothing is read.
template <class A> struct RowOperand {
  const A *data = nullptr; // null: `value` for every row
  int64_t rows = 0;        // all bits, or none: then there is one number for all rows
  A value = 0;

  RowOperand() = default;
  explicit RowOperand(const Operand &o)
      : data(per_token(o) ? nullptr : static_cast<const A *>(o.data)),
        rows(o.per == Per::row ? ~int64_t(0) : 0), value(A(o.value)) {}
  __device__ A at(int64_t row) const { return data ? data[row & rows] : value; }
};

constexpr int tile_steps = int(tile_size / step_size);
constexpr int varying_count = 3; // the first, which may be per token where four tokens are taken at once
constexpr int operand_count = 9;
constexpr int log_ratio_operand = 2;

// Whether a token's ratio or window depends on the tokens before it.
inline bool chained(const PolicyLoss &p) { return p.source == Source::cumulative || p.power != 0; }

// What holds for all tokens of a call, in the type it is used in.
template <class A> struct Call {
  RowOperand<A> rows[operand_count];
  A bound, clamp_low, clamp_high;
  A usual_bound;  // differences up to it are finite and the bound does not hold them
  A reach;        // absolute log-ratios up to it have exponentials, and the clamp does not hold them
  bool rowwise;   // no operand is per token
  bool plain;     // four tokens may be taken at once
  bool different; // log-ratios come from differences

  Call(const PolicyLoss &p, bool aligned)
      : bound(A(p.bound)), clamp_low(A(p.clamp_low)), clamp_high(A(p.clamp_high)),
        usual_bound(std::min(bound, largest)), reach(std::min({-clamp_low, clamp_high, A(80)})),
        rowwise(true), plain(aligned && quads_aligned(static_cast<const A *>(p.slopes))),
        different(p.reference && p.source != Source::given) {
    const Operand *const operands[operand_count] = {&p.advantages,  &p.weights,      &p.log_ratio,
                                                    &p.low,         &p.high,         &p.cap,
                                                    &p.outside_low, &p.outside_high, &p.given};
    for (int i = 0; i < operand_count; ++i) {
      const Operand &o = *operands[i];
      rows[i] = RowOperand<A>(o);
      if (per_token(o)) {
        rowwise = false;
        plain &= quads_aligned(static_cast<const A *>(o.data)) && i < varying_count;
      }
    }
    if (p.source != Source::given)
      rows[log_ratio_operand] = {};
    if (chained(p))
      plain &= rowwise && p.power == 0;
  }

  static constexpr A largest = std::numeric_limits<A>::max();
};

// The operands of a row; a lane reads one of them.
template <class A> struct OfRow {
  A advantage, weight, low, high, cap, log_ratio, outside_low, outside_high, given;

  __device__ OfRow(const Call<A> &call, int64_t row) {
    const A own = lane_id() < operand_count ? call.rows[lane_id()].at(row) : A(0);
    const auto from = [&](int lane) { return __shfl_sync(all_lanes, own, lane); };
    advantage = from(0), weight = from(1), log_ratio = from(2), low = from(3), high = from(4), cap = from(5),
    outside_low = from(6), outside_high = from(7), given = from(8);
  }
};

// Which tokens of a tile take part.
struct Taking {
  unsigned bits;  // of the lane's tokens as tile_bits has them: of those that are live, above them that train
  unsigned whole; // a bit for each step of the warp: all its tokens train

  __device__ Taking(const PolicyLoss &p, int64_t from) : whole(0) {
    constexpr unsigned four = (1u << quad) - 1;
    const unsigned live = tile_bits(p.rows.mask, from, p.rows.size) & tile;
    const unsigned trained = tile_bits(p.trains, from, p.rows.size) & live;
    bits = live | trained << tile_lane;
#pragma unroll
    for (int step = 0; step < tile_steps; ++step)
      whole |= unsigned(__all_sync(all_lanes, (~trained >> step * quad & four) == 0)) << step;
  }

  // The bits of a token of the tile, which another lane may have: live, trained; by the whole warp.
  __device__ unsigned of(int token) const {
    const unsigned found = __shfl_sync(all_lanes, bits, token % int(step_size) / quad) >>
                           (token / int(step_size) * quad + token % quad);
    return (found & 1) | (found >> tile_lane & 1) << 1;
  }

  // Those that are live of sixteen neighbours, as bits; by the whole warp.
  __device__ unsigned live_neighbours() const {
    unsigned live = 0;
#pragma unroll
    for (int k = 0; k < tile_lane; k += quad) {
      const unsigned four = __shfl_sync(all_lanes, bits, (tile_lane * lane_id() + k) / quad % 32);
      live |= (four >> tile_lane * lane_id() / int(step_size) * quad & ((1u << quad) - 1)) << k;
    }
    return live;
  }

  static constexpr int tile_lane = int(tile_size / 32); // tokens of a lane
  static constexpr unsigned tile = (1u << tile_lane) - 1;
  static_assert(2 * tile_lane <= 32, "live and trained share a register");
};

// Four neighbouring numbers; a word of bf16 holds two.
template <class T, class A> __device__ void load_four(const T *p, A (&out)[quad]) {
  const Quad<T> four = *reinterpret_cast<const Quad<T> *>(p);
  if constexpr (std::is_same_v<T, bf16>) {
    unsigned words[quad / 2];
    memcpy(words, &four, sizeof words);
#pragma unroll
    for (int k = 0; k < quad; k += 2) {
      out[k] = from_bits(words[k / 2] << 16);
      out[k + 1] = from_bits(words[k / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int k = 0; k < quad; ++k)
      out[k] = load(four.item[k]);
  }
}

} // namespace tokcredit::cuda
