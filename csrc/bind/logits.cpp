#include "ops/logits.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

Logits inputs(Call &call, const py::object &logits, const py::object &tokens, double temperature) {
  const Array values = call.read_float("logits", logits);
  if (values.dimensions != 2)
    call.fail("logits", "a matrix", text(values));
  const Array ids = call.read("tokens", tokens);
  if ((ids.type != Type::i64 && ids.type != Type::i32) || ids.dimensions != 1 || ids.size != values.shape[0])
    call.fail("tokens", "int64 or int32 [" + std::to_string(values.shape[0]) + "]", text(ids));
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
