#include "ops/divergence.hpp"
#include "bind/module.hpp"

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

} // namespace

void bind_divergence(py::module_ &m) {
  m.attr("DIVERGENCES") = words(Divergence_words);
  m.def("divergence", &forward);
  m.def("divergence_gradient", &backward);
}

} // namespace tokcredit::bind
