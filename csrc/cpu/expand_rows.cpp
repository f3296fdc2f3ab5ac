#include "cpu/expand_rows.hpp"
#include "cpu/rows.hpp"

namespace tokcredit::cpu {
namespace {

template <class T> T plus(T a, T b) { return a + b; }
template <> bool plus(bool a, bool b) { return a || b; }

// `value` where the mask (null: everywhere) is true, else 0.
template <class T> void fill(T *y, const uint8_t *mask, int64_t n, T value) {
  if (mask)
    for (int64_t i = 0; i < n; ++i)
      y[i] = mask[i] ? value : T{};
  else
    for (int64_t i = 0; i < n; ++i)
      y[i] = value;
}

template <class T> void row(const Expand &e, int64_t r) {
  const T *given = static_cast<const T *>(e.row), *body = static_cast<const T *>(e.body),
          *head = static_cast<const T *>(e.head);
  const T base = given ? given[r] : T{};
  const int64_t begin = e.rows.begin[r];
  const auto *mask = e.rows.mask ? reinterpret_cast<const uint8_t *>(e.rows.mask) + begin : nullptr;
  T *y = static_cast<T *>(e.y) + begin;
  int64_t last = e.rows.end[r] - begin;
  if (!e.leaf)
    fill(y, mask, last, base);
  else
    for (int64_t v = e.leaf[r]; v >= 0 && last > 0; v = e.parent[v]) {
      const int64_t first = e.depth[v];
      const T value = body ? plus(base, body[v]) : base;
      fill(y + first, mask ? mask + first : nullptr, last - first, value);
      if (head && first < last && (!mask || mask[first]))
        y[first] = plus(value, head[v]);
      last = first;
    }
  clear_padding(e.rows, r, static_cast<T *>(e.y));
}

template <class T> void rows(const Expand &e, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r)
    row<T>(e, r);
}

} // namespace

namespace TOKCREDIT_LEVEL {

void expand_rows(const Expand &e, int64_t first, int64_t last) {
  switch (e.type) {
  case Type::f64:
    return rows<double>(e, first, last);
  case Type::i64:
    return rows<int64_t>(e, first, last);
  case Type::b8:
    return rows<bool>(e, first, last);
  default:
    return rows<float>(e, first, last);
  }
}

} // namespace TOKCREDIT_LEVEL
} // namespace tokcredit::cpu
