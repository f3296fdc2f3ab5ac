#include "bind/module.hpp"

namespace tokcredit::bind {

void bind_logits(py::module_ &) {}

} // namespace tokcredit::bind
