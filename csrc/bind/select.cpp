#include "ops/select.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void select(const py::object &x, const py::object &begin, const py::object &end, const py::object &mask,
            const py::object &scope, const py::object &wanted, bool ranks, const py::object &y, int threads) {
  Call call(ranks ? "kth" : "top_k");
  const char *name = ranks ? "rank" : "k";
  const Array values = call.read_float("x", x), counts = call.read(name, wanted);
  if (counts.type != Type::i64)
    call.fail(name, "int64", name_of(counts.type));
  const Rows rows = call.rows(begin, end, mask, values.size);
  const Select s{rows,
                 values.type,
                 values.data,
                 call.read_as<int64_t>("scope", scope, Type::i64, rows.count),
                 counts.as<int64_t>(),
                 counts.size};
  const Array out = ranks ? call.read("y", y, accumulated(values.type), counts.size)
                          : call.read("y", y, Type::b8, rows.size);
  call.run(
      [&] { ranks ? cpu::kth(s, out.data, threads) : cpu::top_k(s, out.as<bool>(), threads); },
      [&](auto &queue) { ranks ? cuda::kth(s, out.data, queue) : cuda::top_k(s, out.as<bool>(), queue); });
}

void maximum_variance(const py::object &x, const py::object &scope, const py::object &wanted, bool largest,
                      const py::object &chosen) {
  Call call("maximum_variance");
  const Array values = call.read("x", x), counts = call.read("k", wanted);
  if (values.type != Type::f64)
    call.fail("x", "float64", name_of(values.type));
  if (counts.type != Type::i64)
    call.fail("k", "int64", name_of(counts.type));
  const MaximumVariance m{values.as<double>(),
                          call.read_as<int64_t>("scope", scope, Type::i64, values.size),
                          counts.as<int64_t>(),
                          values.size,
                          counts.size,
                          largest,
                          call.read("chosen", chosen, Type::b8, values.size).as<bool>()};
  call.run([&] { cpu::maximum_variance(m); }, [&](auto &queue) { cuda::maximum_variance(m, queue); });
}

} // namespace

void bind_select(py::module_ &m) {
  m.def("select", &select);
  m.def("maximum_variance", &maximum_variance);
}

} // namespace tokcredit::bind
