// Logs of a mixture m = share * q + (1 - share) * p of two probabilities in float, without an exponential.
// For row loops (see level.hpp).
#pragma once
#include "cpu/pack.hpp"
#include "math/divergence.hpp"

namespace tokcredit::cpu {
namespace {

// Of half = log(q / p) / 2, with g(z) = log cosh z and z = log(share / (1 - share)) / 2:
//     log(m / p) = half + g(half + z) - g(z);   log(q / m) = half - g(half + z) + g(z)
// g is a quotient of polynomials in z^2, minimax, within 1.3e-7 * min(g, 1/2) of it up to `widest`. The
// difference of the two values is y times such a quotient, y = (half + z)^2 - z^2 = half * (half + 2 z): it
// keeps its digits where half is small.
struct MixtureLogs {
  static constexpr int degree = 6;
  static constexpr double widest = 8; // beyond it g(z) = |z| - log(2) in float

  float lowest_half, highest_half, twice_z;
  float above[degree], below[degree]; // above[0] + above[1] * y + ...; 1 + below[0] * y + ...

  explicit MixtureLogs(double share) {
    const double z = std::log(share / (1 - share)) / 2;
    double a[] = {0,
                  4.999999877e-01,
                  2.736169472e-01,
                  4.390554680e-02,
                  2.344126423e-03,
                  3.627473049e-05,
                  1.077348496e-07};
    double b[] = {1,
                  7.138995788e-01,
                  1.623540802e-01,
                  1.350355583e-02,
                  3.721558702e-04,
                  2.628683037e-06,
                  2.055168363e-09};
    in_powers_of_difference(a, z * z);
    in_powers_of_difference(b, z * z);
    for (int k = 0; k < degree; ++k) {
      above[k] = float((a[k + 1] * b[0] - a[0] * b[k + 1]) / (b[0] * b[0]));
      below[k] = float(b[k + 1] / b[0]);
    }
    lowest_half = float(-widest - z);
    highest_half = float(widest - z);
    twice_z = float(2 * z);
  }

  // Of other shares the smaller log would lose digits.
  static bool covers(double share) { return share >= 1.0 / 16 && share <= 15.0 / 16; }

  struct Logs {
    Pack<float> m_by_p, q_by_m;
  };
  Logs of(const Pack<float> &half) const {
    // Also where a logit is -inf. Beyond the bounds one of p and q is nothing beside the other, and its log
    // is constant.
    const Pack<float> wide = at_least(at_most(Pack<float>(far(0.0f) / 2), half), Pack<float>(lowest_half)),
                      own = at_most(wide, Pack<float>(highest_half)), y = own * (own + twice_z);
    Pack<float> n = above[degree - 1], d = below[degree - 1];
    for (int k = degree - 1; k > 0; --k) {
      n = n * y + above[k - 1];
      d = d * y + below[k - 1];
    }
    const Pack<float> bend = y * n / (d * y + 1.0f); // g(half + z) - g(z)
    return {wide + (wide - own) + bend, own - bend};
  }

private:
  // From the coefficients of powers of x to those of powers of x - to.
  static void in_powers_of_difference(double *of, double to) {
    for (int i = 0; i < degree; ++i)
      for (int k = degree - 1; k >= i; --k)
        of[k] += to * of[k + 1];
  }
};

} // namespace
} // namespace tokcredit::cpu
