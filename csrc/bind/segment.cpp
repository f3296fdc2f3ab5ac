#include "bind/module.hpp"

namespace tokcredit::bind {

void bind_segment(py::module_ &) {}

} // namespace tokcredit::bind
