// What a row of logits is made of: where it begins, its ids, and how a logit becomes z.
#pragma once
#include "math/dispatch.hpp"
#include "math/exponential.hpp"
#include "ops/logits.hpp"
#include <type_traits>

namespace tokcredit {

TOKCREDIT_FN int64_t begin_of(const Places &places, int64_t i) {
  return i < places.inner ? i * places.inner_stride
                          : i / places.inner * places.outer_stride + i % places.inner * places.inner_stride;
}

TOKCREDIT_FN int64_t token_of(const Logits &in, int64_t i) {
  return in.token_type == Type::i64 ? static_cast<const int64_t *>(in.tokens)[i]
                                    : int64_t(static_cast<const int32_t *>(in.tokens)[i]);
}

TOKCREDIT_FN bool is_id(const Logits &in, int64_t id) { return id >= 0 && id < in.ids; }

// The column of an id, or -1 where it has none.
TOKCREDIT_FN int64_t column_of(const Logits &in, int64_t id) {
  return is_id(in, id) && id >= in.first && id - in.first < in.vocabulary ? id - in.first : -1;
}

// tanh(x / 2) with x = logit * doubled, and its derivative to x / 2. A logit of -inf stays -inf; a finite
// one may have an x of -inf.
template <class A> struct Capped {
  A value, slope;
};
template <class A> TOKCREDIT_FN Capped<A> capped(A logit, A doubled) {
  const A x = logit * doubled;
  // By exp(-|x|) - 1, which keeps the digits of a small x.
  const Exponentials<A> e = exponentials(choose(x < A{}, x, -x));
  const A sum = e.value + A(1.0f), size = -e.less_one / sum;
  const A value = choose(x < A{}, -size, size);
  return {choose(logit == A(-float(INFINITY)), logit, value), A(4.0f) * e.value / (sum * sum)};
}

// z = v * factor, where v is the logit, or tanh(doubled * logit / 2) with a softcap.
template <class A> struct Scaling {
  double factor, slope; // slope: dz / dlogit, without that of tanh
  A doubled;            // 0 without softcap

  TOKCREDIT_FN A value(A logit) const { return doubled > 0 ? capped(logit, doubled).value : logit; }
};
template <class A> TOKCREDIT_FN Scaling<A> scaling_of(const Logits &in, int64_t i) {
  const double inverse =
      1 / (in.temperatures ? double(static_cast<const A *>(in.temperatures)[i]) : in.temperature);
  const bool caps = in.softcap < INFINITY;
  return {(caps ? in.softcap : in.scale) * inverse, in.scale * inverse,
          caps ? A(2 * in.scale / in.softcap) : A(0)};
}

// z of an id of a row, or 0 where it has no column.
template <class T, class A>
TOKCREDIT_FN double z_of(const Logits &in, const T *x, const Scaling<A> &scaling, int64_t id) {
  const int64_t column = column_of(in, id);
  return column < 0 ? 0.0 : double(scaling.value(load(x[column]))) * scaling.factor;
}

// Sums over a part of a row relative to its largest z.
struct RowState {
  double most, exps, weighted, squares;

  // With those of other parts, as in LogitsState.
  TOKCREDIT_FN void join(double *all) const {
    const double top = all[0] < most ? most : all[0];
    const double before = below(all[0], top), d = below(most, top), f = std::exp(before), g = std::exp(d);
    all[2] = f * (all[2] + before * all[1]) + g * (weighted + d * exps);
    all[1] = f * all[1] + g * exps;
    all[3] = f * f * all[3] + g * g * squares;
    all[0] = top;
  }

private:
  // exp of -746 is 0, and 0 * -746 as well.
  TOKCREDIT_FN static double below(double m, double top) {
    return m == -double(INFINITY) || m - top < -746 ? -746 : m - top;
  }
};

// The incoming gradients of a row times dz / dlogit.
template <class A> struct Incoming {
  const A *chosen; // of its chosen ids
  const int64_t *ids;
  int64_t choices, token;
  double slope, own, from_entropy, from_square, every; // every: of all ids
  bool moves;

  TOKCREDIT_FN Incoming(const LogitsBackward &b, int64_t i, double slope)
      : chosen(static_cast<const A *>(b.grad_chosen)), ids(b.in.chosen), choices(chosen ? b.in.choices : 0),
        token(token_of(b.in, i)), slope(slope), own(times(b.grad_log_probs, i)),
        from_entropy(times(b.grad_entropies, i)), from_square(2 * times(b.grad_squares, i)), every(own),
        moves(own != 0 || from_entropy != 0 || from_square != 0) {
    if (choices) {
      chosen += i * choices;
      ids += i * choices;
    }
    for (int64_t k = 0; k < choices; ++k)
      if (ids[k] != -1) {
        const double its = double(chosen[k]);
        moves |= its != 0;
        every += is_id(b.in, ids[k]) || its == 0 ? its * slope : double(NAN);
      }
  }

  // What the log-prob of an id is multiplied by.
  TOKCREDIT_FN double of_id(int64_t id) const {
    double sum = id == token ? own : 0;
    for (int64_t k = 0; k < choices; ++k)
      sum += ids[k] == id ? double(chosen[k]) * slope : 0;
    return sum;
  }

private:
  TOKCREDIT_FN double times(const void *gradient, int64_t i) const {
    return gradient ? double(static_cast<const A *>(gradient)[i]) * slope : 0.0;
  }
};

// The type of logits and that of their gradient: the same, or half precision for float.
template <class Body> void with_gradient(const LogitsBackward &b, Body &&body) {
  with_float(b.in.type, [&](auto t) {
    if constexpr (std::is_same_v<decltype(t), tag<float>>) {
      if (b.grad_type == Type::bf16)
        return body(t, tag<bf16>{});
      if (b.grad_type == Type::f16)
        return body(t, tag<f16>{});
    }
    body(t, t);
  });
}

} // namespace tokcredit
