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
    call.fail("tokens", "int32 or int64", name_of(text.type));
  const Rows rows = call.rows(begin, end, py::none(), text.size);
  const int64_t R = rows.count, V = 2 * R;
  const int64_t *of = call.groups(group, groups, R);
  const TreeBuild b{rows,
                    text.type,
                    text.data,
                    of,
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

// A parent comes before its children, so that every walk to a root ends.
void check_parents(const Call &call, const int64_t *parent, int64_t nodes) {
  if (call.on_cuda())
    return;
  for (int64_t v = 0; v < nodes; ++v)
    if (parent[v] < -1 || parent[v] >= v)
      call.fail("parent", "a node before its child, or -1",
                std::to_string(parent[v]) + " at " + std::to_string(v));
}

// Where numbers enter a forest, checked.
struct Forest {
  const int64_t *leaf, *parent;
  int64_t rows, nodes;
};

Forest forest(Call &call, const py::handle &leaf, const py::handle &parent, const Array &x) {
  if (x.type != Type::f32 && x.type != Type::f64)
    call.fail("x", "float32 or float64", name_of(x.type));
  const Array up = call.read("parent", parent);
  if (up.type != Type::i64)
    call.fail("parent", "int64", name_of(up.type));
  const Forest f{call.read_as<int64_t>("leaf", leaf, Type::i64, x.size), up.as<int64_t>(), x.size, up.size};
  call.check_range("leaf", f.leaf, f.rows, 0, f.nodes);
  check_parents(call, f.parent, f.nodes);
  return f;
}

void tree_fold(const py::object &leaf, const py::object &parent, const py::object &scale, const py::object &x,
               const py::object &y) {
  Call call("tree_fold");
  const Array values = call.read("x", x);
  const Forest f = forest(call, leaf, parent, values);
  const TreeFold t{values.type, f.leaf,
                   f.parent,    call.optional("scale", scale, values.type, f.nodes).data,
                   values.data, call.read("y", y, values.type, f.nodes).data,
                   f.rows,      f.nodes};
  call.run([&] { cpu::tree_fold(t); }, [&](auto &queue) { cuda::tree_fold(t, queue); });
}

void tree_mean(const py::object &leaf, const py::object &parent, const py::object &counts,
               const py::object &x, bool change, const py::object &y) {
  Call call("tree_mean");
  const Array values = call.read("x", x);
  const Forest f = forest(call, leaf, parent, values);
  const TreeMean t{values.type,
                   f.leaf,
                   f.parent,
                   call.optional("counts", counts, Type::b8, f.rows).as<bool>(),
                   values.data,
                   change,
                   call.read("y", y, values.type, f.nodes).data,
                   f.rows,
                   f.nodes};
  call.run([&] { cpu::tree_mean(t); }, [&](auto &queue) { cuda::tree_mean(t, queue); });
}

// Along every walk from a row's leaf to its root, nodes begin inside the row and ever earlier.
void check_depths(const Call &call, const Expand &e, int64_t nodes) {
  if (call.on_cuda())
    return;
  const auto refuse = [&](int64_t v) {
    call.fail("depth", "depths that grow from a node to its child and end inside the row",
              std::to_string(e.depth[v]) + " at " + std::to_string(v));
  };
  for (int64_t v = 0; v < nodes; ++v)
    if (e.depth[v] < (e.parent[v] < 0 ? 0 : e.depth[e.parent[v]]))
      refuse(v);
  for (int64_t r = 0; r < e.rows.count; ++r)
    if (e.depth[e.leaf[r]] > e.rows.end[r] - e.rows.begin[r])
      refuse(e.leaf[r]);
}

void expand(const py::object &begin, const py::object &end, const py::object &mask, const py::object &row,
            const py::object &leaf, const py::object &parent, const py::object &depth, const py::object &body,
            const py::object &head, const py::object &y, int threads) {
  Call call("expand");
  const Array out = call.read("y", y);
  if (out.type != Type::f32 && out.type != Type::f64 && out.type != Type::i64 && out.type != Type::b8)
    call.fail("y", "float32, float64, int64 or bool", name_of(out.type));
  const Rows rows = call.rows(begin, end, mask, out.size);
  Expand e{};
  e.rows = rows;
  e.type = out.type;
  e.row = call.optional("row", row, out.type, rows.count).data;
  e.y = out.data;
  if (!leaf.is_none()) {
    const Array up = call.read("parent", parent);
    if (up.type != Type::i64)
      call.fail("parent", "int64", name_of(up.type));
    const int64_t V = up.size;
    e.nodes = V;
    e.leaf = call.read_as<int64_t>("leaf", leaf, Type::i64, rows.count);
    e.parent = up.as<int64_t>();
    e.depth = call.read_as<int64_t>("depth", depth, Type::i64, V);
    e.body = call.optional("body", body, out.type, V).data;
    e.head = call.optional("head", head, out.type, V).data;
    call.check_range("leaf", e.leaf, rows.count, 0, V);
    check_parents(call, e.parent, V);
    check_depths(call, e, V);
  }
  call.run([&] { cpu::expand(e, threads); }, [&](auto &queue) { cuda::expand(e, queue); });
}

} // namespace

void bind_tree(py::module_ &m) {
  m.def("tree_build", &tree_build);
  m.def("tree_fold", &tree_fold);
  m.def("tree_mean", &tree_mean);
  m.def("expand", &expand);
}

} // namespace tokcredit::bind
