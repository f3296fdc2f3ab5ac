#include "ops/logits.hpp"
#include "bind/module.hpp"
#include <cmath>
#include <cstdio>

namespace tokcredit::bind {
namespace {

std::string written(double x) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", x);
  return digits;
}

Logits inputs(Call &call, const py::object &logits, const py::object &tokens, double temperature,
              const py::object &temperatures, double scale, double softcap, const py::object &chosen,
              int64_t first, int64_t ids) {
  const Matrix values = call.read_matrix("logits", logits);
  if (!is_float(values.array.type))
    call.fail("logits", "a float dtype", name_of(values.array.type));
  const int64_t rows = values.rows;
  const Array of_rows = call.read("tokens", tokens);
  if ((of_rows.type != Type::i64 && of_rows.type != Type::i32) || of_rows.size != rows)
    call.fail("tokens", "int64 or int32 [" + std::to_string(rows) + "]", text(of_rows));
  if (!(scale > 0))
    call.fail("scale", "a positive number", std::to_string(scale));
  const double least = least_softcap(scale), most = most_softcap(scale);
  if (!(softcap >= least && softcap <= most) && softcap != INFINITY)
    call.fail("softcap", written(least) + " to " + written(most) + ", or infinity", written(softcap));
  if (ids < 0)
    ids = values.columns; // they are the whole vocabulary
  if (first < 0 || first > ids)
    call.fail("first", "0 to " + std::to_string(ids), std::to_string(first));
  Array choices;
  if (!chosen.is_none()) {
    choices = call.read("chosen", chosen);
    if (choices.type != Type::i64 || choices.dimensions != 2 || choices.shape[0] != rows)
      call.fail("chosen", "int64 [" + std::to_string(rows) + ", K]", text(choices));
  }
  return {rows,
          values.columns,
          values.places,
          values.array.type,
          of_rows.type,
          values.array.data,
          of_rows.data,
          temperature,
          call.optional("temperatures", temperatures, accumulated(values.array.type), rows).data,
          scale,
          softcap,
          choices.as<int64_t>(),
          choices.data ? choices.shape[1] : 0,
          first,
          ids};
}

void forward(const py::object &logits, const py::object &tokens, double temperature,
             const py::object &temperatures, double scale, double softcap, const py::object &chosen,
             const py::object &log_probs, const py::object &entropies, const py::object &squares,
             const py::object &chosen_log_probs, const py::object &logsumexp, int threads) {
  Call call("logits");
  const Logits in = inputs(call, logits, tokens, temperature, temperatures, scale, softcap, chosen, 0, -1);
  const Type out = accumulated(in.type);
  const LogitsForward f{in,
                        call.read("log_probs", log_probs, out, in.rows).data,
                        call.read("entropies", entropies, out, in.rows).data,
                        call.optional("squares", squares, out, in.rows).data,
                        call.optional("chosen_log_probs", chosen_log_probs, out, in.rows * in.choices).data,
                        call.read("logsumexp", logsumexp, Type::f64, in.rows).as<double>()};
  call.run([&] { cpu::logits(f, threads); }, [&](auto &queue) { cuda::logits(f, queue); });
}

void join(const py::object &logits, const py::object &tokens, double temperature,
          const py::object &temperatures, double scale, double softcap, const py::object &chosen,
          int64_t first, int64_t ids, const py::object &before, const py::object &state, int threads) {
  Call call("logits");
  const Logits in =
      inputs(call, logits, tokens, temperature, temperatures, scale, softcap, chosen, first, ids);
  const int64_t size = in.rows * (numbers_of_state + in.choices);
  const LogitsState s{in, call.optional("before", before, Type::f64, size).as<double>(),
                      call.read("state", state, Type::f64, size).as<double>()};
  call.run([&] { cpu::logits_state(s, threads); }, [&](auto &queue) { cuda::logits_state(s, queue); });
}

void backward(const py::object &logits, const py::object &tokens, double temperature,
              const py::object &temperatures, double scale, double softcap, const py::object &chosen,
              int64_t first, int64_t ids, const py::object &logsumexp, const py::object &entropies,
              const py::object &squares, const py::object &grad_log_probs, const py::object &grad_entropies,
              const py::object &grad_squares, const py::object &grad_chosen, const py::object &grad,
              int threads) {
  Call call("logits");
  const Logits in =
      inputs(call, logits, tokens, temperature, temperatures, scale, softcap, chosen, first, ids);
  const Type out = accumulated(in.type);
  const Matrix written = call.read_matrix("grad", grad);
  const Type type = written.array.type;
  const bool narrow = in.type == Type::f32 && (type == Type::bf16 || type == Type::f16);
  if ((type != in.type && !narrow) || written.rows != in.rows || written.columns != in.vocabulary)
    call.fail("grad",
              name_of(in.type) + " [" + std::to_string(in.rows) + ", " + std::to_string(in.vocabulary) + "]",
              text(written.array));
  const LogitsBackward b{in,
                         call.read("logsumexp", logsumexp, Type::f64, in.rows).as<double>(),
                         call.read("entropies", entropies, out, in.rows).data,
                         call.optional("squares", squares, out, in.rows).data,
                         call.optional("grad_log_probs", grad_log_probs, out, in.rows).data,
                         call.optional("grad_entropies", grad_entropies, out, in.rows).data,
                         call.optional("grad_squares", grad_squares, out, in.rows).data,
                         call.optional("grad_chosen", grad_chosen, out, in.rows * in.choices).data,
                         type,
                         written.places,
                         written.array.data};
  if (b.grad_squares && !b.squares)
    call.fail("squares", "a number for each row where there is grad_squares", "None");
  call.run([&] { cpu::logits_gradient(b, threads); }, [&](auto &queue) { cuda::logits_gradient(b, queue); });
}

} // namespace

void bind_logits(py::module_ &m) {
  m.def("logits", &forward);
  m.def("logits_state", &join);
  m.def("logits_gradient", &backward);
}

} // namespace tokcredit::bind
