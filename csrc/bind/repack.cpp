#include "ops/repack.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void check_rows(const Call &call, const Repack &p, int64_t source_size) {
  if (call.on_cuda())
    return;
  int64_t last = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t from = p.from[r], to = p.to[r], length = p.length[r];
    const auto got = [&] {
      return std::to_string(length) + " from " + std::to_string(from) + " to " + std::to_string(to) + " at " +
             std::to_string(r);
    };
    if (from < 0 || length < 0 || length > source_size || from > source_size - length)
      call.fail("from, length", "spans inside [0, " + std::to_string(source_size) + "]", got());
    if (to < last || to > p.size - length)
      call.fail("to, length", "ascending, disjoint spans inside [0, " + std::to_string(p.size) + "]", got());
    last = to + length;
  }
}

void repack(const py::object &x, const py::object &from, const py::object &to, const py::object &length,
            const py::object &y, int threads) {
  Call call("repack");
  const Array source = call.read("x", x), target = call.read("y", y), starts = call.read("from", from);
  if (target.type != source.type)
    call.fail("y", name_of(source.type), name_of(target.type));
  if (starts.type != Type::i64)
    call.fail("from", "int64", name_of(starts.type));
  const Repack p{source.type,
                 source.data,
                 starts.as<int64_t>(),
                 call.read_as<int64_t>("to", to, Type::i64, starts.size),
                 call.read_as<int64_t>("length", length, Type::i64, starts.size),
                 starts.size,
                 target.data,
                 target.size,
                 source.size};
  check_rows(call, p, source.size);
  call.run([&] { cpu::repack(p, threads); }, [&](auto &queue) { cuda::repack(p, queue); });
}

} // namespace

void bind_repack(py::module_ &m) { m.def("repack", &repack); }

} // namespace tokcredit::bind
