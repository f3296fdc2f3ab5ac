// From a runtime type to a template argument.
#pragma once
#include "math/number.hpp"
#include "ops/array.hpp"
#include <stdexcept>

namespace tokcredit {

template <class T> struct tag {
  using type = T;
};

template <class Body> void with_float(Type type, Body &&body) {
  switch (type) {
  case Type::f32:
    return body(tag<float>{});
  case Type::f64:
    return body(tag<double>{});
  case Type::bf16:
    return body(tag<bf16>{});
  case Type::f16:
    return body(tag<f16>{});
  default:
    throw std::invalid_argument("expected a floating type");
  }
}

} // namespace tokcredit
