// The soft surrogate and the estimators of a divergence in whole steps of rows whose tokens share all
// operands, as RowClip takes them: log-ratios are finite and inside the clamp, and what is the same for all
// tokens is multiplied in at the end of the row.
#pragma once
#include "cuda/policy_loss_clip.cuh"
#include "cuda/powers.cuh"

namespace tokcredit::cuda {

// Within 1 ulp.
__device__ inline float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return 1 / x;
#endif
}

// exp(x) and exp(-x), as usual_exponential has them.
__device__ inline void usual_exponentials(float x, float &ratio, float &inverse) {
#ifdef __CUDA_ARCH__
  const float h = x * 1.44269504f, left = fmaf(h, 1.90465421e-9f, fmaf(h, -0.693147182f, x));
  const float up = power_of_two(h), down = power_of_two(-h);
  ratio = fmaf(up, left, up);
  inverse = fmaf(down, -left, down);
#else
  ratio = exponential(x);
  inverse = exponential(-x);
#endif
}

// Sums over a lane's tokens: of values before the row's factor, of ratios less 1, of log-ratios.
struct RowSums {
  float value = 0, excess = 0, log_ratio = 0;
  unsigned tokens = 0;

  __device__ void add(const float (&x)[quad], const float (&ratio)[quad], const float (&values)[quad]) {
#pragma unroll
    for (int k = 0; k < quad; ++k) {
      value += values[k];
      excess += ratio[k] - 1;
      log_ratio += x[k];
    }
    tokens += quad;
  }

  __device__ void add_to(Tally &tally, float factor) const {
    tally.loss += double(factor) * double(value);
    tally.ratio += tokens + double(excess);
    tally.divergence += double(excess) - double(log_ratio);
    tally.tokens += tokens;
  }
};

// The soft surrogate. `of_value` is the factor of values, `tau` is for powers of 2.
struct RowSoft {
  float factor, of_value, tau;
  RowSums sums;

  __device__ RowSoft(const PolicyLoss &, const OfRow<float> &row) : factor(-4 * row.advantage * row.weight) {
    const float own = row.advantage > 0 ? row.high : row.low;
    of_value = factor / own;
    tau = own * float(log2_e);
  }

  // Whether the row can be taken so.
  __device__ bool usual() const { return factor - factor == 0 && of_value - of_value == 0; }

  // False, and nothing done, if one of the warp's tokens must be taken otherwise.
  __device__ bool take(const float (&x)[quad], bool within, float (&slope)[quad]) {
    float q[quad], s[quad];
#pragma unroll
    for (int k = 0; k < quad; ++k) {
      q[k] = usual_exponential(x[k]);
      s[k] = -tau * (q[k] - 1);
      within &= std::fabs(s[k]) <= 120;
    }
    if (!__all_sync(all_lanes, within))
      return false;
#pragma unroll
    for (int k = 0; k < quad; ++k) {
      s[k] = reciprocal(1 + power_of_two(s[k]));
      slope[k] = factor * q[k] * (s[k] - s[k] * s[k]);
    }
    sums.add(x, q, s);
    return true;
  }

  __device__ void add_to(Tally &tally) const { sums.add_to(tally, of_value); }
};

// The estimators of a divergence. A token beyond the limit is taken otherwise.
struct RowDivergence {
  Surrogate kind;
  float factor, limit;
  RowSums sums;

  __device__ RowDivergence(const PolicyLoss &p, const OfRow<float> &row)
      : kind(p.surrogate), factor(row.advantage * row.weight), limit(float(p.limit)) {}

  __device__ bool usual() const { return factor - factor == 0; }

  __device__ bool take(const float (&x)[quad], bool within, float (&slope)[quad]) {
    const auto with = [&](auto &&estimate) { return take(x, within, slope, estimate); };
    switch (kind) {
    case Surrogate::k1:
      return with([this](float u, float, float &slope) {
        slope = factor;
        return u;
      });
    case Surrogate::k2:
      return with([this](float u, float, float &slope) {
        slope = factor * u;
        return u * u / 2;
      });
    case Surrogate::abs:
      return with([this](float u, float, float &slope) {
        slope = factor * sign(u);
        return std::fabs(u);
      });
    case Surrogate::k3:
      return with([this](float u, float inverse, float &slope) {
        slope = factor - factor * inverse;
        return inverse + u - 1;
      });
    default:
      return with([this](float u, float inverse, float &slope) {
        slope = factor * u;
        return inverse + u - 1;
      });
    }
  }

  template <class Estimate>
  __device__ bool take(const float (&x)[quad], bool within, float (&slope)[quad], Estimate &&estimate) {
    float value[quad], q[quad];
#pragma unroll
    for (int k = 0; k < quad; ++k) {
      float inverse;
      usual_exponentials(x[k], q[k], inverse);
      value[k] = estimate(x[k], inverse, slope[k]);
      within &= std::fabs(value[k]) <= limit;
    }
    if (!__all_sync(all_lanes, within))
      return false;
    sums.add(x, q, value);
    return true;
  }

  __device__ void add_to(Tally &tally) const { sums.add_to(tally, factor); }
};

} // namespace tokcredit::cuda
