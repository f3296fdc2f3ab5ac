#include "ops/score.hpp"
#include "bind/module.hpp"
#include "ops/segment.hpp"

namespace tokcredit::bind {
namespace {

// An array of float32 or float64, after whose type and size the others go.
Array numbers(Call &call, const char *name, const py::handle &x) {
  const Array array = call.read(name, x);
  if (array.type != Type::f32 && array.type != Type::f64)
    call.fail(name, "float32 or float64", name_of(array.type));
  return array;
}

void deviation(const py::object &x, const py::object &pivot, const py::object &moments, double floor,
               bool positive, const py::object &y, int threads) {
  Call call("deviation");
  const Array values = numbers(call, "x", x);
  const Deviation d{
      values.type,
      values.data,
      call.read("pivot", pivot, values.type, 1).data,
      call.read_as<double>("moments", moments, Type::f64, width_of(Reduction::moments)),
      floor,
      positive,
      values.size,
      call.read("y", y, values.type, values.size).data,
  };
  call.run([&] { cpu::deviation(d, threads); }, [&](auto &queue) { cuda::deviation(d, queue); });
}

void score_bounds(const py::object &score, double low, double high, double widen, const py::object &below,
                  const py::object &above, int threads) {
  Call call("score_bounds");
  const Array h = numbers(call, "score", score);
  const ScoreBounds s{h.type,
                      h.data,
                      low,
                      high,
                      widen,
                      h.size,
                      call.read("below", below, h.type, h.size).data,
                      call.read("above", above, h.type, h.size).data};
  call.run([&] { cpu::score_bounds(s, threads); }, [&](auto &queue) { cuda::score_bounds(s, queue); });
}

void score_factor(const py::object &score, const py::object &log_ratio, const py::object &low,
                  const py::object &high, double low_number, double high_number, double strength,
                  const py::object &y, int threads) {
  Call call("score_factor");
  const Array h = numbers(call, "score", score);
  const ScoreFactor s{h.type,
                      h.data,
                      call.read("log_ratio", log_ratio, h.type, h.size).data,
                      call.optional("low", low, h.type, h.size).data,
                      call.optional("high", high, h.type, h.size).data,
                      low_number,
                      high_number,
                      strength,
                      h.size,
                      call.read("y", y, h.type, h.size).data};
  call.run([&] { cpu::score_factor(s, threads); }, [&](auto &queue) { cuda::score_factor(s, queue); });
}

} // namespace

void bind_score(py::module_ &m) {
  m.def("deviation", &deviation);
  m.def("score_bounds", &score_bounds);
  m.def("score_factor", &score_factor);
}

} // namespace tokcredit::bind
