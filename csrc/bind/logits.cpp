#include "ops/logits.hpp"
#include "bind/module.hpp"
#include <string>

namespace tokcredit::bind {
namespace {

std::string text(const Array &a) {
  std::string out = "[";
  for (size_t i = 0; i < a.shape.size(); ++i)
    out += (i ? ", " : "") + std::to_string(a.shape[i]);
  return out + "]";
}

Logits inputs(Call &call, const py::object &logits, const py::object &tokens, double temperature) {
  const Array values = call.read("logits", logits);
  if (values.shape.size() != 2 || values.type == Type::i32 || values.type == Type::i64 ||
      values.type == Type::b8)
    throw py::value_error("logits: logits: expected a float matrix, got shape " + text(values));
  const Array ids = call.read("tokens", tokens);
  if ((ids.type != Type::i64 && ids.type != Type::i32) || ids.shape.size() != 1 ||
      ids.size() != values.shape[0])
    throw py::value_error("logits: tokens: expected int64 or int32 [" + std::to_string(values.shape[0]) +
                          "], got shape " + text(ids) + " or another dtype");
  return {values.shape[0], values.shape[1], values.type, ids.type, values.data, ids.data, temperature};
}

void forward(const py::object &logits, const py::object &tokens, double temperature,
             const py::object &log_probs, const py::object &entropies, const py::object &logsumexp,
             int threads) {
  Call call("logits");
  const Logits in = inputs(call, logits, tokens, temperature);
  const Type out = accumulated(in.type);
  const LogitsForward f{in, call.read("log_probs", log_probs, out, in.rows).data,
                        call.read("entropies", entropies, out, in.rows).data,
                        call.read("logsumexp", logsumexp, Type::f64, in.rows).as<double>()};
  call.run([&] { cpu::logits(f, threads); }, [&](auto &queue) { cuda::logits(f, queue); });
}

void backward(const py::object &logits, const py::object &tokens, double temperature,
              const py::object &logsumexp, const py::object &entropies, const py::object &grad_log_probs,
              const py::object &grad_entropies, const py::object &grad, int threads) {
  Call call("logits");
  const Logits in = inputs(call, logits, tokens, temperature);
  const Type out = accumulated(in.type);
  const LogitsBackward b{in,
                         call.read("logsumexp", logsumexp, Type::f64, in.rows).as<double>(),
                         call.read("entropies", entropies, out, in.rows).data,
                         call.optional("grad_log_probs", grad_log_probs, out, in.rows).data,
                         call.optional("grad_entropies", grad_entropies, out, in.rows).data,
                         call.read("grad", grad, in.type, in.rows * in.vocabulary).data};
  call.run([&] { cpu::logits_gradient(b, threads); }, [&](auto &queue) { cuda::logits_gradient(b, queue); });
}

} // namespace

void bind_logits(py::module_ &m) {
  m.def("logits", &forward);
  m.def("logits_gradient", &backward);
}

} // namespace tokcredit::bind
