#include "bind/module.hpp"

namespace tokcredit::bind {

void bind_select(py::module_ &) {}

} // namespace tokcredit::bind
