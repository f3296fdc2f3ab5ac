#include "ops/repack.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void repack(const py::object &x, const py::object &from, const py::object &to, const py::object &length,
            const py::object &y, int threads) {
  Call call("repack");
  const Array source = call.read("x", x), target = call.read("y", y);
  const int64_t rows = call.read("from", from).size();
  const Repack p{source.type,
                 source.data,
                 call.read("from", from, Type::i64, rows).as<int64_t>(),
                 call.read("to", to, Type::i64, rows).as<int64_t>(),
                 call.read("length", length, Type::i64, rows).as<int64_t>(),
                 rows,
                 call.read("y", y, source.type, target.size()).data,
                 target.size(),
                 source.size()};
  call.run([&] { cpu::repack(p, threads); }, [&](auto &queue) { cuda::repack(p, queue); });
}

} // namespace

void bind_repack(py::module_ &m) { m.def("repack", &repack); }

} // namespace tokcredit::bind
