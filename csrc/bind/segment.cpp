#include "ops/segment.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void segment_rows(const py::object &x, const py::object &begin, const py::object &end, const py::object &mask,
                  int reduction, double ddof, const py::object &y, int threads) {
  Call call("segment");
  const Array values = call.read("x", x);
  const Rows rows = call.rows(begin, end, mask, values.size());
  // A count reads no values, so they may be of any type.
  const bool counts = Reduction(reduction) == Reduction::count && values.type != Type::f64;
  const Type type = counts ? Type::f32 : values.type;
  const SegmentRows s{rows,      type, values.data,
                      reduction, ddof, call.read("y", y, accumulated(type), rows.count).data};
  call.run([&] { cpu::segment_rows(s, threads); }, [&](auto &queue) { cuda::segment_rows(s, queue); });
}

void segment_ids(const py::object &x, const py::object &ids, const py::object &mask, int reduction,
                 double ddof, const py::object &y) {
  Call call("segment");
  const Array values = call.read("x", x);
  const int64_t n = values.size();
  const Array out = call.read("y", y);
  const SegmentIds s{values.type,
                     values.data,
                     call.read("ids", ids, Type::i64, n).as<int64_t>(),
                     call.optional("mask", mask, Type::b8, n).as<bool>(),
                     n,
                     out.size(),
                     reduction,
                     ddof,
                     call.read("y", y, accumulated(values.type), out.size()).data};
  call.run([&] { cpu::segment_ids(s); }, [&](auto &queue) { cuda::segment_ids(s, queue); });
}

} // namespace

void bind_segment(py::module_ &m) {
  m.def("segment_rows", &segment_rows);
  m.def("segment_ids", &segment_ids);
}

} // namespace tokcredit::bind
