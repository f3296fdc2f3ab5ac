#include "bind/module.hpp"

namespace tokcredit::bind {

void bind_policy_loss(py::module_ &) {}

} // namespace tokcredit::bind
