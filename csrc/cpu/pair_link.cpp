#include "ops/pair_link.hpp"
#include "math/pair_link.hpp"
#include <algorithm>

namespace tokcredit::cpu {
namespace {

template <class A> void all_pairs(const PairLink &l) {
  std::fill_n(static_cast<A *>(l.slopes), l.rows, A(0));
  double total = 0;
  for (int64_t p = 0; p < l.count; ++p)
    total += link_pair<A>(l, p);
  *static_cast<A *>(l.total) = A(total);
}

} // namespace

void pair_link(const PairLink &l) { l.type == Type::f64 ? all_pairs<double>(l) : all_pairs<float>(l); }

} // namespace tokcredit::cpu
