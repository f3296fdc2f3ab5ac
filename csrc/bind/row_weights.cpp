#include "ops/row_weights.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void row_weights(const py::object &lengths, int64_t given, int counted, bool by_length, double length,
                 double factor, const py::object &y) {
  Call call("row_weights");
  const Array rows = call.read("lengths", lengths);
  if (rows.type != Type::i64)
    call.fail("lengths", "int64", name_of(rows.type));
  const RowWeights w{rows.as<int64_t>(),
                     rows.size,
                     given,
                     call.one_of<Counted>("counted", counted, Counted_words),
                     by_length,
                     length,
                     factor,
                     call.read("y", y, Type::f64, by_length ? rows.size : 1).as<double>()};
  call.run([&] { cpu::row_weights(w); }, [&](auto &queue) { cuda::row_weights(w, queue); });
}

} // namespace

void bind_row_weights(py::module_ &m) {
  m.attr("COUNTED") = words(Counted_words);
  m.def("row_weights", &row_weights);
}

} // namespace tokcredit::bind
