#include "ops/select.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void select(const py::object &x, const py::object &begin, const py::object &end, const py::object &mask,
            const py::object &scope, const py::object &wanted, bool ranks, const py::object &y, int threads) {
  Call call(ranks ? "kth" : "top_k");
  const Array values = call.read("x", x);
  const Rows rows = call.rows(begin, end, mask, values.size());
  const int64_t scopes = call.read(ranks ? "rank" : "k", wanted).size();
  const Select s{rows,
                 values.type,
                 values.data,
                 call.read("scope", scope, Type::i64, rows.count).as<int64_t>(),
                 call.read(ranks ? "rank" : "k", wanted, Type::i64, scopes).as<int64_t>(),
                 scopes};
  const Array out =
      ranks ? call.read("y", y, accumulated(values.type), scopes) : call.read("y", y, Type::b8, rows.size);
  call.run(
      [&] { ranks ? cpu::kth(s, out.data, threads) : cpu::top_k(s, out.as<bool>(), threads); },
      [&](auto &queue) { ranks ? cuda::kth(s, out.data, queue) : cuda::top_k(s, out.as<bool>(), queue); });
}

void maximum_variance(const py::object &x, const py::object &scope, const py::object &wanted,
                      const py::object &chosen) {
  Call call("maximum_variance");
  const int64_t rows = call.read("x", x).size(), scopes = call.read("k", wanted).size();
  const MaximumVariance m{call.read("x", x, Type::f64, rows).as<double>(),
                          call.read("scope", scope, Type::i64, rows).as<int64_t>(),
                          call.read("k", wanted, Type::i64, scopes).as<int64_t>(),
                          rows,
                          scopes,
                          call.read("chosen", chosen, Type::b8, rows).as<bool>()};
  call.run([&] { cpu::maximum_variance(m); }, [&](auto &queue) { cuda::maximum_variance(m, queue); });
}

} // namespace

void bind_select(py::module_ &m) {
  m.def("select", &select);
  m.def("maximum_variance", &maximum_variance);
}

} // namespace tokcredit::bind
