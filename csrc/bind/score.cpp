#include "ops/score.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

// An array of float32 or float64, after whose type and size the others go.
Array numbers(Call &call, const char *name, const py::handle &x) {
  const Array array = call.read(name, x);
  if (array.type != Type::f32 && array.type != Type::f64)
    call.fail(name, "float32 or float64", name_of(array.type));
  return array;
}

void log_deviation(const py::object &x, const py::object &begin, const py::object &end,
                   const py::object &mask, double quantile, double floor, bool positive, const py::object &y,
                   const py::object &statistics, int threads) {
  Call call("log_deviation");
  const Array values = call.read_float("x", x);
  if (!(quantile >= 0 && quantile <= 1))
    call.fail("quantile", "a number from 0 to 1", std::to_string(quantile));
  const LogDeviation d{call.rows(begin, end, mask, values.size),
                       values.type,
                       values.data,
                       quantile,
                       floor,
                       positive,
                       call.read("y", y, accumulated(values.type), values.size).data,
                       call.read("statistics", statistics, Type::f64, 4).as<double>()};
  call.run([&] { cpu::log_deviation(d, threads); }, [&](auto &queue) { cuda::log_deviation(d, queue); });
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

void score_factor(const py::object &score, const py::object &log_probs, const py::object &reference,
                  const py::object &advantages, const py::object &begin, const py::object &end,
                  const py::object &low_bound, const py::object &high_bound, double low, double high,
                  double widen, double strength, double clamp_low, double clamp_high, const py::object &y,
                  int threads) {
  Call call("score_factor");
  const Array h = numbers(call, "score", score);
  if (low_bound.is_none() != high_bound.is_none())
    call.fail("high_bound", "both bounds or none", "one");
  const Rows rows = call.rows(begin, end, py::none(), h.size);
  const ScoreFactor s{rows,
                      h.type,
                      h.data,
                      call.read("log_probs", log_probs, h.type, h.size).data,
                      call.optional("reference", reference, h.type, h.size).data,
                      call.read("advantages", advantages, h.type, rows.count).data,
                      call.optional("low_bound", low_bound, h.type, h.size).data,
                      call.optional("high_bound", high_bound, h.type, h.size).data,
                      low,
                      high,
                      widen,
                      strength,
                      clamp_low,
                      clamp_high,
                      call.read("y", y, h.type, h.size).data};
  call.run([&] { cpu::score_factor(s, threads); }, [&](auto &queue) { cuda::score_factor(s, queue); });
}

} // namespace

void bind_score(py::module_ &m) {
  m.def("log_deviation", &log_deviation);
  m.def("score_bounds", &score_bounds);
  m.def("score_factor", &score_factor);
}

} // namespace tokcredit::bind
