#include "ops/select.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

// `wanted`, or None for a share.
Quota quota(Call &call, const char *name, const py::object &wanted, int64_t scopes, double share,
            int rounding, int64_t least) {
  const auto how = call.one_of<Rounding>("rounding", rounding, Rounding_words);
  if (scopes < 0)
    call.fail("scopes", "at least 0", std::to_string(scopes));
  if (wanted.is_none() && !(share >= 0 && share <= 1))
    call.fail("share", "a number from 0 to 1", std::to_string(share));
  return {call.optional(name, wanted, Type::i64, scopes).as<int64_t>(), share, how, least};
}

void select(const py::object &x, const py::object &begin, const py::object &end, const py::object &mask,
            const py::object &scope, const py::object &wanted, int64_t scopes, double share, int rounding,
            int64_t least, bool ranks, const py::object &y, int threads) {
  Call call(ranks ? "kth" : "top_k");
  const Array values = call.read_float("x", x);
  const Rows rows = call.rows(begin, end, mask, values.size);
  const Select s{rows,
                 values.type,
                 values.data,
                 call.optional("scope", scope, Type::i64, rows.count).as<int64_t>(),
                 quota(call, ranks ? "rank" : "k", wanted, scopes, share, rounding, least),
                 scopes};
  const Array out =
      ranks ? call.read("y", y, accumulated(values.type), scopes) : call.read("y", y, Type::b8, rows.size);
  call.run(
      [&] { ranks ? cpu::kth(s, out.data, threads) : cpu::top_k(s, out.as<bool>(), threads); },
      [&](auto &queue) { ranks ? cuda::kth(s, out.data, queue) : cuda::top_k(s, out.as<bool>(), queue); });
}

void maximum_variance(const py::object &x, const py::object &scope, const py::object &wanted, int64_t scopes,
                      double share, int rounding, int64_t least, bool largest, const py::object &chosen) {
  Call call("maximum_variance");
  const Array values = call.read("x", x);
  if (values.type != Type::f64)
    call.fail("x", "float64", name_of(values.type));
  const MaximumVariance m{values.as<double>(),
                          call.read_as<int64_t>("scope", scope, Type::i64, values.size),
                          quota(call, "k", wanted, scopes, share, rounding, least),
                          values.size,
                          scopes,
                          largest,
                          call.read("chosen", chosen, Type::b8, values.size).as<bool>()};
  call.run([&] { cpu::maximum_variance(m); }, [&](auto &queue) { cuda::maximum_variance(m, queue); });
}

void within_mean(const py::object &x, const py::object &begin, const py::object &end, const py::object &mask,
                 double budget, int64_t least, const py::object &chosen) {
  Call call("within_mean");
  const Array values = call.read("x", x);
  if (values.type != Type::f32 && values.type != Type::f64)
    call.fail("x", "float32 or float64", name_of(values.type));
  const Rows rows = call.rows(begin, end, mask, values.size);
  const WithinMean w{rows,   values.type, values.data,
                     budget, least,       call.read("chosen", chosen, Type::b8, rows.size).as<bool>()};
  call.run([&] { cpu::within_mean(w); }, [&](auto &queue) { cuda::within_mean(w, queue); });
}

} // namespace

void bind_select(py::module_ &m) {
  m.attr("ROUNDINGS") = words(Rounding_words);
  m.def("select", &select);
  m.def("maximum_variance", &maximum_variance);
  m.def("within_mean", &within_mean);
}

} // namespace tokcredit::bind
