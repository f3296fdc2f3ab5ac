#include "ops/policy_loss.hpp"
#include "bind/module.hpp"
#include <string>

namespace tokcredit::bind {
namespace {

// [] is one number, [R, 1] one per row, [N] one per token.
Operand operand(Call &call, const char *name, const py::handle &x, Type type, const Rows &rows) {
  if (x.is_none())
    return {nullptr, Per::batch};
  const Array a = call.read(name, x);
  const bool row = a.shape.size() == 2;
  const int64_t expected = a.shape.empty() ? 1 : row ? rows.count : rows.size;
  call.read(name, x, type, expected);
  return {a.data, a.shape.empty() ? Per::batch : row ? Per::row : Per::token};
}

void policy_loss(const py::object &log_probs, const py::object &reference, const py::object &log_ratio,
                 const py::object &advantages, const py::object &weights, const py::object &low,
                 const py::object &high, const py::object &cap, const py::object &begin,
                 const py::object &end, const py::object &mask, const py::object &trains, int surrogate,
                 bool cumulative, double bound, double power, double clamp_low, double clamp_high,
                 const py::object &stats, const py::object &gradient, int threads) {
  Call call("policy_loss");
  const Array lp = call.read("log_probs", log_probs);
  const Rows rows = call.rows(begin, end, mask, lp.size());
  const Type type = accumulated(lp.type);
  PolicyLoss p{};
  p.rows = rows;
  p.trains = call.optional("trains", trains, Type::b8, rows.size).as<bool>();
  p.type = lp.type;
  p.log_probs = lp.data;
  p.reference = call.optional("old_log_probs", reference, lp.type, rows.size).data;
  p.log_ratio = operand(call, "log_ratio", log_ratio, type, rows);
  p.advantages = operand(call, "advantages", advantages, type, rows);
  p.weights = operand(call, "weights", weights, type, rows);
  p.low = operand(call, "low", low, type, rows);
  p.high = operand(call, "high", high, type, rows);
  p.cap = operand(call, "cap", cap, type, rows);
  p.surrogate = surrogate;
  p.cumulative = cumulative;
  p.bound = bound;
  p.power = power;
  if (cumulative && (reference.is_none() || !log_ratio.is_none()))
    throw py::value_error("policy_loss: cumulative: expected old_log_probs and no log_ratio");
  p.clamp_low = clamp_low;
  p.clamp_high = clamp_high;
  p.stats = call.read("stats", stats, Type::f64, rows.count * loss_stats).as<double>();
  p.gradient = gradient.is_none() ? nullptr : call.read("gradient", gradient, type, rows.size).data;
  call.run([&] { cpu::policy_loss(p, threads); }, [&](auto &queue) { cuda::policy_loss(p, queue); });
}

} // namespace

void bind_policy_loss(py::module_ &m) { m.def("policy_loss", &policy_loss); }

} // namespace tokcredit::bind
