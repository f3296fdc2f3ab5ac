// Where the rows of a matrix begin, such as those of a slice [:, :-1]: row i lies
// (i / inner) * outer_stride + (i % inner) * inner_stride elements after the first.
#pragma once
#include <cstdint>

namespace tokcredit {

struct Places {
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
};

} // namespace tokcredit
