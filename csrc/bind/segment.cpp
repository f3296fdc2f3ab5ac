#include "ops/segment.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

Type result_type(Reduction kind, Type type) {
  return kind == Reduction::moments ? Type::f64 : kind == Reduction::count ? Type::i64 : accumulated(type);
}

void segment_rows(const py::object &x, const py::object &begin, const py::object &end, const py::object &mask,
                  int reduction, double ddof, const py::object &y, int threads) {
  Call call("segment");
  const auto kind = call.one_of<Reduction>("reduction", reduction, Reduction_words);
  // A count reads no values, so they may be of any type.
  const bool counts = kind == Reduction::count;
  const Array values = counts ? call.read("x", x) : call.read_float("x", x);
  const Rows rows = call.rows(begin, end, mask, values.size);
  const Type type = counts ? Type::f64 : values.type;
  const SegmentRows s{
      rows, type, values.data,
      kind, ddof, call.read("y", y, result_type(kind, type), rows.count * width_of(kind)).data};
  call.run([&] { cpu::segment_rows(s, threads); }, [&](auto &queue) { cuda::segment_rows(s, queue); });
}

void weighted_moments(const py::object &x, const py::object &weights, const py::object &begin,
                      const py::object &end, const py::object &mask, double ddof, const py::object &y) {
  Call call("weighted_moments");
  const Array values = call.read("x", x);
  if (values.type != Type::f32 && values.type != Type::f64)
    call.fail("x", "float32 or float64", name_of(values.type));
  const Rows rows = call.rows(begin, end, mask, values.size);
  const WeightedMoments w{
      rows,        values.type,
      values.data, call.read_as<double>("weights", weights, Type::f64, values.size),
      ddof,        call.read("y", y, Type::f64, rows.count * width_of(Reduction::moments)).as<double>(),
  };
  call.run([&] { cpu::weighted_moments(w); }, [&](auto &queue) { cuda::weighted_moments(w, queue); });
}

void segment_ids(const py::object &x, const py::object &ids, const py::object &mask, int reduction,
                 double ddof, const py::object &y) {
  Call call("segment");
  const auto kind = call.one_of<Reduction>("reduction", reduction, Reduction_words);
  const Array values = call.read_float("x", x), out = call.read("y", y);
  if (out.type != result_type(kind, values.type))
    call.fail("y", name_of(result_type(kind, values.type)), name_of(out.type));
  if (out.size % width_of(kind) != 0)
    call.fail("y", "[segments, " + std::to_string(width_of(kind)) + "]", text(out));
  const SegmentIds s{values.type,
                     values.data,
                     call.read_as<int64_t>("ids", ids, Type::i64, values.size),
                     call.optional("mask", mask, Type::b8, values.size).as<bool>(),
                     values.size,
                     out.size / width_of(kind),
                     kind,
                     ddof,
                     out.data};
  call.run([&] { cpu::segment_ids(s); }, [&](auto &queue) { cuda::segment_ids(s, queue); });
}

void standardize(const py::object &x, const py::object &group, const py::object &moments, int standard,
                 double epsilon, const py::object &y) {
  Call call("standardize");
  const Array values = call.read("x", x), all = call.read("moments", moments), out = call.read("y", y);
  for (const auto &[name, array] : {std::pair{"x", values}, std::pair{"y", out}})
    if (array.type != Type::f32 && array.type != Type::f64)
      call.fail(name, "float32 or float64", name_of(array.type));
  constexpr int64_t width = width_of(Reduction::moments);
  if (all.type != Type::f64 || all.size % width != 0)
    call.fail("moments", "float64 [groups, " + std::to_string(width) + "]", text(all));
  if (out.size != values.size)
    call.fail("y", "[" + std::to_string(values.size) + "]", text(out));
  const int64_t groups = all.size / width;
  const Standardize s{values.type,
                      values.data,
                      call.groups(group, groups, values.size),
                      all.as<double>(),
                      values.size,
                      groups,
                      call.one_of<Standard>("standard", standard, Standard_words),
                      epsilon,
                      out.type,
                      out.data};
  if (groups == 0)
    return;
  call.run([&] { cpu::standardize(s); }, [&](auto &queue) { cuda::standardize(s, queue); });
}

void row_affine(const py::object &x, const py::object &factor, const py::object &shift,
                const py::object &begin, const py::object &end, const py::object &mask, double low,
                double high, const py::object &y, int threads) {
  Call call("row_affine");
  const Array values = call.read("x", x), out = call.read("y", y), by = call.read("factor", factor);
  if (values.type != Type::f32 && values.type != Type::f64)
    call.fail("x", "float32 or float64", name_of(values.type));
  if ((out.type != Type::f32 && out.type != Type::f64 && out.type != Type::b8) || out.size != values.size)
    call.fail("y", "float32, float64 or bool [" + std::to_string(values.size) + "]", text(out));
  const Rows rows = call.rows(begin, end, mask, values.size);
  const int64_t expected = by.dimensions > 0 ? rows.count : 1;
  if (by.type != Type::f64 || by.size != expected)
    call.fail("factor", "float64 [" + std::to_string(expected) + "]", text(by));
  const RowAffine a{rows,
                    values.type,
                    values.data,
                    by.as<double>(),
                    call.read_as<double>("shift", shift, Type::f64, expected),
                    by.dimensions > 0,
                    low,
                    high,
                    out.type,
                    out.data};
  call.run([&] { cpu::row_affine(a, threads); }, [&](auto &queue) { cuda::row_affine(a, queue); });
}

} // namespace

void bind_segment(py::module_ &m) {
  m.attr("REDUCTIONS") = words(Reduction_words);
  m.attr("MOMENTS") = words(Moment_words);
  m.attr("STANDARDS") = words(Standard_words);
  m.def("segment_rows", &segment_rows);
  m.def("weighted_moments", &weighted_moments);
  m.def("segment_ids", &segment_ids);
  m.def("standardize", &standardize);
  m.def("row_affine", &row_affine);
}

} // namespace tokcredit::bind
