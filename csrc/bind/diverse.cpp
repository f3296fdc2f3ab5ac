#include "ops/diverse.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void diverse(const py::object &x, const py::object &score, const py::object &begin, const py::object &end,
             const py::object &mask, const py::object &number, int64_t steps, double weight, bool product,
             const py::object &order, int threads) {
  Call call("diverse");
  const Array vectors = call.read_float("x", x), scores = call.read("score", score);
  if (vectors.type == Type::f64 || vectors.dimensions != 2)
    call.fail("x", "float32, bfloat16 or float16 [N, width]", text(vectors));
  const int64_t size = vectors.shape[0];
  if (size > INT64_C(0xffffffff))
    call.fail("x", "at most 2^32 - 1 tokens", std::to_string(size));
  if (scores.type != Type::f32 || scores.size != size)
    call.fail("score", "float32 [" + std::to_string(size) + "]", text(scores));
  if (!(weight >= 0 && weight <= 1))
    call.fail("weight", "a number from 0 to 1", std::to_string(weight));
  const Rows rows = call.rows(begin, end, mask, size);
  const Diverse d{rows,
                  vectors.type,
                  vectors.data,
                  vectors.shape[1],
                  scores.as<float>(),
                  call.read_as<int64_t>("number", number, Type::i64, rows.count),
                  std::min(std::max(steps, int64_t(0)), size),
                  float(weight),
                  product,
                  call.read("order", order, Type::i64, size).as<int64_t>()};
  call.run([&] { cpu::diverse(d, threads); }, [&](auto &queue) { cuda::diverse(d, queue); });
}

} // namespace

void bind_diverse(py::module_ &m) { m.def("diverse", &diverse); }

} // namespace tokcredit::bind
