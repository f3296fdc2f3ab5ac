#include "ops/divergence.hpp"
#include "bind/module.hpp"
#include "ops/divergence_top.hpp"

namespace tokcredit::bind {
namespace {

DivergenceRows inputs(Call &call, const py::object &student, const py::object &teacher,
                      const py::object &other, const py::object &weights, const py::object &mask, int kind,
                      double share, double temperature) {
  const Array values = call.read_float("student", student);
  if (values.dimensions != 2)
    call.fail("student", "a matrix", text(values));
  const int64_t rows = values.shape[0], vocabulary = values.shape[1];
  const auto logits = [&](const char *name, const py::object &tensor) {
    const Array x = call.read(name, tensor, values.type, values.size);
    if (x.dimensions != 2 || x.shape[1] != vocabulary)
      call.fail(name, "[" + std::to_string(rows) + ", " + std::to_string(vocabulary) + "]", text(x));
    return x.data;
  };
  if (other.is_none() != weights.is_none())
    call.fail("weights", "a number for each row where there is `other`, else None", "one of the two");
  return {rows,
          vocabulary,
          values.type,
          values.data,
          logits("teacher", teacher),
          other.is_none() ? nullptr : logits("other", other),
          call.optional("weights", weights, accumulated(values.type), rows).data,
          call.optional("mask", mask, Type::b8, rows).as<bool>(),
          call.one_of<Divergence>("kind", kind, Divergence_words),
          share,
          temperature};
}

void forward(const py::object &student, const py::object &teacher, const py::object &other,
             const py::object &weights, const py::object &mask, int kind, double share, double temperature,
             const py::object &values, const py::object &entropies, const py::object &saved, int threads) {
  Call call("divergence");
  const DivergenceRows in = inputs(call, student, teacher, other, weights, mask, kind, share, temperature);
  const Type out = accumulated(in.type);
  const DivergenceForward f{in, call.read("values", values, out, in.rows).data,
                            call.read("entropies", entropies, out, in.rows).data,
                            call.read("saved", saved, Type::f64, in.rows * saved_of_divergence).as<double>()};
  call.run([&] { cpu::divergence(f, threads); }, [&](auto &queue) { cuda::divergence(f, queue); });
}

void backward(const py::object &student, const py::object &teacher, const py::object &other,
              const py::object &weights, const py::object &mask, int kind, double share, double temperature,
              const py::object &saved, const py::object &grad_values, const py::object &grad, int threads) {
  Call call("divergence");
  const DivergenceRows in = inputs(call, student, teacher, other, weights, mask, kind, share, temperature);
  const DivergenceBackward b{in,
                             call.read("saved", saved, Type::f64, in.rows * saved_of_divergence).as<double>(),
                             call.read("grad_values", grad_values, accumulated(in.type), in.rows).data,
                             call.read("grad", grad, in.type, in.rows * in.vocabulary).data};
  call.run([&] { cpu::divergence_gradient(b, threads); },
           [&](auto &queue) { cuda::divergence_gradient(b, queue); });
}

TopRows top_inputs(Call &call, const py::object &student, const py::object &ids, const py::object &mask,
                   double temperature) {
  const Array values = call.read_float("student", student);
  if (values.dimensions != 2)
    call.fail("student", "a matrix", text(values));
  const int64_t rows = values.shape[0];
  const Array top = call.read("ids", ids);
  if ((top.type != Type::i64 && top.type != Type::i32) || top.dimensions != 2 || top.shape[0] != rows ||
      top.shape[1] < 1 || top.shape[1] > most_top)
    call.fail("ids", "int64 or int32 [" + std::to_string(rows) + ", 1 to " + std::to_string(most_top) + "]",
              text(top));
  return {rows,       values.shape[1], top.shape[1], values.type,
          top.type,   values.data,     top.data,     call.optional("mask", mask, Type::b8, rows).as<bool>(),
          temperature};
}

void top_forward(const py::object &student, const py::object &ids, const py::object &log_probs,
                 const py::object &mask, int kind, double share, int outside, double temperature,
                 const py::object &values, const py::object &entropies, const py::object &saved,
                 const py::object &slopes, int threads) {
  Call call("divergence");
  const TopRows in = top_inputs(call, student, ids, mask, temperature);
  const Type out = accumulated(in.type);
  const DivergenceTopForward f{in,
                               call.read("log_probs", log_probs, out, in.rows * in.top).data,
                               call.one_of<Divergence>("kind", kind, Divergence_words),
                               share,
                               call.one_of<Outside>("outside", outside, Outside_words),
                               call.read("values", values, out, in.rows).data,
                               call.read("entropies", entropies, out, in.rows).data,
                               call.read("saved", saved, Type::f64, 2 * in.rows).as<double>(),
                               call.read("slopes", slopes, Type::f64, in.rows * in.top).as<double>()};
  if (f.outside == Outside::cut && f.kind != Divergence::forward_kl && f.kind != Divergence::reverse_kl)
    call.fail("outside", "bucket or renormalised where the divergence is from a mixture", "cut");
  call.run([&] { cpu::divergence_top(f, threads); }, [&](auto &queue) { cuda::divergence_top(f, queue); });
}

void top_backward(const py::object &student, const py::object &ids, const py::object &mask,
                  double temperature, const py::object &saved, const py::object &slopes,
                  const py::object &grad_values, const py::object &grad, int threads) {
  Call call("divergence");
  const TopRows in = top_inputs(call, student, ids, mask, temperature);
  const DivergenceTopBackward b{in, call.read("saved", saved, Type::f64, 2 * in.rows).as<double>(),
                                call.read("slopes", slopes, Type::f64, in.rows * in.top).as<double>(),
                                call.read("grad_values", grad_values, accumulated(in.type), in.rows).data,
                                call.read("grad", grad, in.type, in.rows * in.vocabulary).data};
  call.run([&] { cpu::divergence_top_gradient(b, threads); },
           [&](auto &queue) { cuda::divergence_top_gradient(b, queue); });
}

} // namespace

void bind_divergence(py::module_ &m) {
  m.attr("DIVERGENCES") = words(Divergence_words);
  m.attr("OUTSIDES") = words(Outside_words);
  m.attr("MOST_TOP") = most_top;
  m.def("divergence_top", &top_forward);
  m.def("divergence_top_gradient", &top_backward);
  m.def("divergence", &forward);
  m.def("divergence_gradient", &backward);
}

} // namespace tokcredit::bind
