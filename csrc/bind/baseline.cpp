#include "ops/baseline.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void baseline(const py::object &log_probs, const py::object &squares, const py::object &rewards,
              const py::object &begin, const py::object &end, const py::object &mask, const py::object &group,
              int64_t groups, double epsilon, const py::object &advantages, const py::object &returns,
              int threads) {
  Call call("baseline");
  const Array lp = call.read_float("log_probs", log_probs), given = call.read("rewards", rewards);
  const Rows rows = call.rows(begin, end, mask, lp.size);
  const Type out = accumulated(lp.type);
  const bool per_row = given.dimensions == 2;
  const int64_t expected = per_row ? rows.count : rows.size;
  if (given.type != lp.type || given.size != expected)
    call.fail("rewards", name_of(lp.type) + " [" + std::to_string(expected) + "]", text(given));
  const int64_t *of = call.groups(group, groups, rows.count);
  const Baseline b{rows,
                   lp.type,
                   of,
                   groups,
                   lp.data,
                   call.read("squares", squares, lp.type, rows.size).data,
                   given.data,
                   per_row,
                   epsilon,
                   call.read("advantages", advantages, out, rows.size).data,
                   call.optional("returns", returns, out, rows.size).data};
  call.run([&] { cpu::baseline(b, threads); }, [&](auto &queue) { cuda::baseline(b, queue); });
}

} // namespace

void bind_baseline(py::module_ &m) { m.def("baseline", &baseline); }

} // namespace tokcredit::bind
