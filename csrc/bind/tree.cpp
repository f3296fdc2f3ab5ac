#include "ops/tree.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

void tree_build(const py::object &tokens, const py::object &begin, const py::object &end,
                const py::object &group, int64_t groups, const py::object &leaf, const py::object &parent,
                const py::object &group_of, const py::object &depth, const py::object &length,
                const py::object &count, const py::object &degree, const py::object &size, int threads) {
  Call call("tree_build");
  const Array text = call.read("tokens", tokens);
  if (text.type != Type::i32 && text.type != Type::i64)
    throw py::value_error("tree_build: tokens: expected int32 or int64, got another dtype");
  const Rows rows = call.rows(begin, end, py::none(), text.size());
  const int64_t R = rows.count, V = 2 * R;
  const TreeBuild b{rows,
                    text.type,
                    text.data,
                    call.read("group", group, Type::i64, R).as<int64_t>(),
                    groups,
                    call.read("leaf", leaf, Type::i64, R).as<int64_t>(),
                    call.read("parent", parent, Type::i64, V).as<int64_t>(),
                    call.read("group_of", group_of, Type::i64, V).as<int64_t>(),
                    call.read("depth", depth, Type::i64, V).as<int64_t>(),
                    call.read("length", length, Type::i64, V).as<int64_t>(),
                    call.read("count", count, Type::i64, V).as<int64_t>(),
                    call.read("degree", degree, Type::i64, V).as<int64_t>(),
                    call.read("size", size, Type::i64, 1).as<int64_t>()};
  call.run([&] { cpu::tree_build(b, threads); }, [&](auto &queue) { cuda::tree_build(b, queue); });
}

void tree_fold(const py::object &leaf, const py::object &parent, const py::object &scale, const py::object &x,
               const py::object &y) {
  Call call("tree_fold");
  const Array values = call.read("x", x);
  const Array up = call.read("parent", parent);
  const int64_t V = up.size(), R = values.size();
  const TreeFold f{values.type,
                   call.read("leaf", leaf, Type::i64, R).as<int64_t>(),
                   call.read("parent", parent, Type::i64, V).as<int64_t>(),
                   call.optional("scale", scale, values.type, V).data,
                   values.data,
                   call.read("y", y, accumulated(values.type), V).data,
                   R,
                   V};
  call.run([&] { cpu::tree_fold(f); }, [&](auto &queue) { cuda::tree_fold(f, queue); });
}

void expand(const py::object &begin, const py::object &end, const py::object &mask, const py::object &row,
            const py::object &leaf, const py::object &parent, const py::object &depth, const py::object &body,
            const py::object &head, const py::object &y, int threads) {
  Call call("expand");
  const Array out = call.read("y", y);
  const Rows rows = call.rows(begin, end, mask, out.size());
  const int64_t R = rows.count, V = parent.is_none() ? 0 : call.read("parent", parent).size();
  const Expand e{rows,
                 out.type,
                 call.optional("row", row, out.type, R).data,
                 call.optional("leaf", leaf, Type::i64, R).as<int64_t>(),
                 call.optional("parent", parent, Type::i64, V).as<int64_t>(),
                 call.optional("depth", depth, Type::i64, V).as<int64_t>(),
                 call.optional("body", body, out.type, V).data,
                 call.optional("head", head, out.type, V).data,
                 out.data,
                 V};
  call.run([&] { cpu::expand(e, threads); }, [&](auto &queue) { cuda::expand(e, queue); });
}

} // namespace

void bind_tree(py::module_ &m) {
  m.def("tree_build", &tree_build);
  m.def("tree_fold", &tree_fold);
  m.def("expand", &expand);
}

} // namespace tokcredit::bind
