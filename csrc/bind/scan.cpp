#include "ops/scan.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void scan(const py::object &x, const py::object &begin, const py::object &end, const py::object &mask,
          double decay, const py::object &decays, const py::object &carry_in, bool reverse, bool exclusive,
          const py::object &y, const py::object &carry_out, int threads) {
  Call call("scan");
  const Array values = call.read_float("x", x);
  const Rows rows = call.rows(begin, end, mask, values.size);
  const Type out = accumulated(values.type);
  const Scan s{rows,
               values.type,
               values.data,
               call.optional("carry_in", carry_in, out, rows.count).data,
               call.read("y", y, out, rows.size).data,
               call.read("carry_out", carry_out, out, rows.count).data,
               decay,
               reverse,
               exclusive,
               call.optional("decays", decays, Type::f64, rows.count).as<double>()};
  call.run([&] { cpu::scan(s, threads); }, [&](auto &queue) { cuda::scan(s, queue); });
}

} // namespace

void bind_scan(py::module_ &m) { m.def("scan", &scan); }

} // namespace tokcredit::bind
