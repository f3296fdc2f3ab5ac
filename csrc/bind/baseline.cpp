#include "ops/baseline.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void baseline(const py::object &log_probs, const py::object &squares, const py::object &rewards,
              const py::object &begin, const py::object &end, const py::object &mask, const py::object &group,
              int64_t groups, double epsilon, const py::object &advantages, const py::object &returns,
              int threads) {
  Call call("baseline");
  const Array lp = call.read("log_probs", log_probs);
  const Rows rows = call.rows(begin, end, mask, lp.size());
  const Type out = accumulated(lp.type);
  const bool per_row = call.read("rewards", rewards).shape.size() == 2;
  const Baseline b{rows,
                   lp.type,
                   call.read("group", group, Type::i64, rows.count).as<int64_t>(),
                   groups,
                   lp.data,
                   call.read("squares", squares, lp.type, rows.size).data,
                   call.read("rewards", rewards, lp.type, per_row ? rows.count : rows.size).data,
                   per_row,
                   epsilon,
                   call.read("advantages", advantages, out, rows.size).data,
                   returns.is_none() ? nullptr : call.read("returns", returns, out, rows.size).data};
  call.run([&] { cpu::baseline(b, threads); }, [&](auto &queue) { cuda::baseline(b, queue); });
}

} // namespace

void bind_baseline(py::module_ &m) { m.def("baseline", &baseline); }

} // namespace tokcredit::bind
