#include "ops/policy_loss.hpp"
#include "bind/module.hpp"
#include <cmath>
#include <pybind11/stl.h>

namespace tokcredit::bind {
namespace {

struct NamedOperand {
  const char *name;
  Operand PolicyLoss::*place;
  double absent; // what stands for one that is not given
};
constexpr NamedOperand operands[] = {
    {"log_ratio", &PolicyLoss::log_ratio, 0},
    {"advantages", &PolicyLoss::advantages, 1},
    {"weights", &PolicyLoss::weights, 1},
    {"low", &PolicyLoss::low, -INFINITY},
    {"high", &PolicyLoss::high, INFINITY},
    {"cap", &PolicyLoss::cap, INFINITY},
    {"outside_low", &PolicyLoss::outside_low, 0},
    {"outside_high", &PolicyLoss::outside_high, 0},
    {"given", &PolicyLoss::given, 0},
};
constexpr size_t operand_count = std::size(operands);

// [] is one number, [R, 1] one per row, [N] one per token; None is `number`.
Operand operand(Call &call, const char *name, const py::handle &x, double number, Type type,
                const Rows &rows) {
  if (x.is_none())
    return {nullptr, Per::batch, number};
  const Array a = call.read(name, x);
  const Per per = a.dimensions == 0 ? Per::batch : a.dimensions == 2 ? Per::row : Per::token;
  const int64_t expected = per == Per::batch ? 1 : per == Per::row ? rows.count : rows.size;
  if (a.type != type || a.size != expected)
    call.fail(name, name_of(type) + " [" + std::to_string(expected) + "]", text(a));
  return {a.data, per, number};
}

// An empty reference has no pointer, so whether there is one is said apart.
void check_combination(const Call &call, const PolicyLoss &p, bool has_reference) {
  if (has_reference)
    return;
  if (p.source == Source::cumulative)
    call.fail("reference", "a tensor, because the log-ratio is cumulative", "None");
  if (p.surrogate == Surrogate::gated && p.on != Coordinate::ratio && p.on != Coordinate::difference)
    call.fail("reference", "a tensor, because the gate compares probabilities", "None");
}

void policy_loss(const py::object &log_probs, const py::object &reference, const py::list &tensors,
                 const std::vector<double> &numbers, const py::object &begin, const py::object &end,
                 const py::object &mask, const py::object &trains, int surrogate, int source, int on,
                 int gated_value, bool both_sides, double bound, double power, double limit, double clamp_low,
                 double clamp_high, const py::object &values, const py::object &stats,
                 const py::object &slopes, int threads) {
  Call call("policy_loss");
  const Array lp = call.read_float("log_probs", log_probs);
  const Rows rows = call.rows(begin, end, mask, lp.size);
  const Type type = accumulated(lp.type);
  PolicyLoss p{};
  p.rows = rows;
  p.trains = call.optional("trains", trains, Type::b8, rows.size).as<bool>();
  p.type = lp.type;
  p.log_probs = lp.data;
  p.reference = call.optional("reference", reference, lp.type, rows.size).data;
  if (tensors.size() != operand_count || numbers.size() != operand_count)
    call.fail("operands", std::to_string(operand_count) + " tensors and numbers",
              std::to_string(tensors.size()) + " and " + std::to_string(numbers.size()));
  for (size_t i = 0; i < operand_count; ++i)
    p.*operands[i].place = operand(call, operands[i].name, py::object(tensors[i]), numbers[i], type, rows);
  p.surrogate = call.one_of<Surrogate>("surrogate", surrogate, Surrogate_words);
  p.source = call.one_of<Source>("source", source, Source_words);
  p.on = call.one_of<Coordinate>("on", on, Coordinate_words);
  p.gated_value = call.one_of<GatedValue>("value", gated_value, GatedValue_words);
  p.both_sides = both_sides;
  p.bound = bound;
  p.power = power;
  p.limit = limit;
  p.clamp_low = clamp_low;
  p.clamp_high = clamp_high;
  p.values = call.read("values", values, type, rows.count).data;
  p.stats = call.read("stats", stats, Type::f64, rows.count * loss_stats).as<double>();
  p.slopes = slopes.is_none() ? nullptr : call.read("slopes", slopes, type, rows.size).data;
  check_combination(call, p, !reference.is_none());
  call.run([&] { cpu::policy_loss(p, threads); }, [&](auto &queue) { cuda::policy_loss(p, queue); });
}

void scale_rows(const py::object &x, const py::object &factor, const py::object &begin, const py::object &end,
                const py::object &y, int threads) {
  Call call("scale_rows");
  const Array slopes = call.read("x", x);
  if (slopes.type != Type::f32 && slopes.type != Type::f64)
    call.fail("x", "float32 or float64", name_of(slopes.type));
  const Rows rows = call.rows(begin, end, py::none(), slopes.size);
  const Array factors = call.read("factor", factor);
  if (factors.type != slopes.type || (factors.size != 1 && factors.size != rows.count))
    call.fail("factor", name_of(slopes.type) + " [" + std::to_string(rows.count) + "] or one number",
              text(factors));
  const ScaleRows s{rows,
                    slopes.type,
                    slopes.data,
                    factors.data,
                    factors.dimensions > 0,
                    call.read("y", y, slopes.type, slopes.size).data};
  call.run([&] { cpu::scale_rows(s, threads); }, [&](auto &queue) { cuda::scale_rows(s, queue); });
}

} // namespace

void bind_policy_loss(py::module_ &m) {
  m.attr("SURROGATES") = words(Surrogate_words);
  m.attr("SOURCES") = words(Source_words);
  m.attr("COORDINATES") = words(Coordinate_words);
  m.attr("GATED_VALUES") = words(GatedValue_words);
  m.attr("LOSS_STATS") = words(LossStat_words);
  py::dict absent;
  for (const NamedOperand &o : operands)
    absent[o.name] = o.absent;
  m.attr("OPERANDS") = absent;
  m.def("policy_loss", &policy_loss);
  m.def("scale_rows", &scale_rows);
}

} // namespace tokcredit::bind
