#include "ops/tree_pack.hpp"
#include "bind/module.hpp"
#include <memory>

namespace tokcredit::bind {
namespace {

void check_contexts(const Call &call, const TreePack &p, int64_t size) {
  for (int64_t r = 0; r < p.rows.count; ++r)
    if (p.context_begin[r] < 0 || p.context_end[r] < p.context_begin[r] || p.context_end[r] > size)
      call.fail("context_begin, context_end", "spans inside [0, " + std::to_string(size) + "]",
                "[" + std::to_string(p.context_begin[r]) + ", " + std::to_string(p.context_end[r]) + ") at " +
                    std::to_string(r));
}

[[noreturn]] void refuse(const TreePack &p, const TreePackSizes &sizes) {
  const auto number = [](int64_t x) { return std::to_string(x); };
  std::string who = "row " + number(sizes.row);
  if (p.together && sizes.error != TreePackError::predecessor)
    who = "the rows of together id " + number(p.together[sizes.row]);
  switch (sizes.error) {
  case TreePackError::predecessor:
    throw py::value_error(
        "wanted: expected False at the first token of a row without a context, because nothing "
        "predicts it, got True in " +
        who);
  case TreePackError::budget:
    throw py::value_error("budget: expected at least " + number(sizes.needed) + " places, which " + who +
                          " needs, got " + number(p.budget));
  case TreePackError::predictions:
    throw py::value_error("predictions: expected at least " + number(sizes.needed) + " for " + who +
                          ", got " + number(p.predictions));
  default:
    throw py::value_error("batch: expected fewer than 2 ** 31 distinct tokens, got " + number(sizes.needed));
  }
}

// Returns the arrays of the contract in its order; `allocate(numbers, type)` makes them.
py::list tree_pack(const py::object &tokens, const py::object &begin, const py::object &end,
                   const py::object &wanted, const py::object &contexts, const py::object &context_begin,
                   const py::object &context_end, const py::object &tags, const py::object &context_tags,
                   const py::object &group, int64_t groups, const py::object &together, int64_t budget,
                   int64_t predictions, int64_t bin_cost, int64_t ranks, int threads,
                   const py::function &allocate) {
  Call call("tree_pack");
  const Array text = call.read("tokens", tokens);
  if (text.type != Type::i32 && text.type != Type::i64)
    call.fail("tokens", "int32 or int64", name_of(text.type));
  const Array before = call.read("contexts", contexts);
  if (before.type != text.type)
    call.fail("contexts", name_of(text.type), name_of(before.type));
  if (wanted.is_none())
    call.fail("wanted", "bool [N]", "None");
  const Rows rows = call.rows(begin, end, wanted, text.size);
  const int64_t R = rows.count;
  if (tags.is_none() != context_tags.is_none())
    call.fail("context_tags", "tags of both or of neither", "one of them");
  if (budget < 1 || predictions < 1 || bin_cost < 0 || bin_cost > int64_t(1) << 40 || ranks < 1 ||
      ranks > 1 << 20)
    call.fail("budget, predictions, bin_cost, ranks", "positive numbers", "others");
  const TreePack p{text.type,
                   rows,
                   text.data,
                   before.data,
                   call.read_as<int64_t>("context_begin", context_begin, Type::i64, R),
                   call.read_as<int64_t>("context_end", context_end, Type::i64, R),
                   call.optional("tags", tags, Type::i64, text.size).as<int64_t>(),
                   call.optional("context_tags", context_tags, Type::i64, before.size).as<int64_t>(),
                   call.groups(group, groups, R),
                   groups,
                   call.optional("together", together, Type::i64, R).as<int64_t>(),
                   budget,
                   predictions,
                   bin_cost,
                   ranks};
  const auto cpu_only = [&](auto &) { call.fail("tokens", "CPU tensors", "CUDA tensors"); };
  if (!call.on_cuda())
    check_contexts(call, p, before.size);
  TreePackSizes sizes{};
  std::unique_ptr<cpu::TreePlan, decltype(&cpu::tree_free)> plan(nullptr, &cpu::tree_free);
  call.run([&] { plan.reset(cpu::tree_plan(p, sizes, threads)); }, cpu_only);
  if (sizes.error != TreePackError::none)
    refuse(p, sizes);
  py::list out;
  const auto made = [&](const char *name, Type type, int64_t size) {
    const py::object tensor = allocate(size, name_of(type));
    out.append(tensor);
    return call.read(name, tensor, type, size).data;
  };
  const auto numbers = [&](const char *name, int64_t size) {
    return static_cast<int64_t *>(made(name, Type::i64, size));
  };
  const auto places = [&](const char *name, int64_t size) {
    return static_cast<int32_t *>(made(name, Type::i32, size));
  };
  const int64_t S = sizes.segments, Q = sizes.predictions, B = sizes.bins;
  TreePackArrays a{};
  a.tokens = made("tokens", text.type, sizes.places);
  a.segment_begin = numbers("segment_begin", S + 1);
  a.segment_parent = numbers("segment_parent", S);
  a.segment_end = numbers("segment_end", S);
  a.segment_depth = numbers("segment_depth", S);
  a.source = places("source", Q);
  a.target = numbers("target", Q);
  a.index = places("index", text.size);
  a.row_order = numbers("row_order", sizes.packed);
  a.row_shared = numbers("row_shared", sizes.packed);
  a.row_bin = places("row_bin", R);
  a.row_length = numbers("row_length", R);
  a.bin_places = numbers("bin_places", B + 1);
  a.bin_predictions = numbers("bin_predictions", B + 1);
  a.bin_rows = numbers("bin_rows", B + 1);
  call.run([&] { cpu::tree_write(*plan, a, threads); }, cpu_only);
  return out;
}

} // namespace

void bind_tree_pack(py::module_ &m) { m.def("tree_pack", &tree_pack); }

} // namespace tokcredit::bind
