#include "ops/pair_link.hpp"
#include "bind/module.hpp"
#include <pybind11/stl.h>

namespace tokcredit::bind {
namespace {

constexpr size_t numbers_per_term = 5;

void pair_link(const py::object &scores, const py::object &divisors, const py::object &pairs,
               const py::object &weights, const std::vector<int> &functions,
               const std::vector<double> &numbers, double scale, const py::object &total,
               const py::object &slopes, const py::object &table) {
  Call call("pair_link");
  const Array given = call.read("scores", scores);
  if (given.type != Type::f32 && given.type != Type::f64)
    call.fail("scores", "float32 or float64", name_of(given.type));
  PairLink l{};
  l.type = given.type;
  l.scores = given.data;
  l.rows = given.size;
  l.divisors = call.optional("divisors", divisors, Type::i64, l.rows).as<int64_t>();
  if (!pairs.is_none()) {
    const Array rows = call.read("pairs", pairs);
    if (rows.type != Type::i64 || rows.size % 2 != 0)
      call.fail("pairs", "int64 [P, 2]", text(rows));
    l.pairs = rows.as<int64_t>();
    l.count = rows.size / 2;
    call.check_range("pairs", l.pairs, rows.size, 0, l.rows);
  } else if (l.rows % 2 == 0) {
    l.count = l.rows / 2;
  } else {
    call.fail("scores", "two for each pair", text(given));
  }
  l.weights = call.optional("weights", weights, Type::f64, l.count).as<double>();
  if (functions.size() > most_link_terms || numbers.size() != numbers_per_term * functions.size())
    call.fail("functions, numbers", "at most 4 functions with 5 numbers each",
              std::to_string(functions.size()) + " and " + std::to_string(numbers.size()));
  l.term_count = int32_t(functions.size());
  for (size_t i = 0; i < functions.size(); ++i) {
    const double *x = numbers.data() + i * numbers_per_term;
    l.terms[i] = {call.one_of<LinkFunction>("functions", functions[i], LinkFunction_words),
                  x[0],
                  x[1],
                  x[2],
                  x[3],
                  x[4]};
  }
  l.scale = scale;
  l.total = call.read("total", total, l.type, 1).data;
  l.slopes = call.read("slopes", slopes, l.type, l.rows).data;
  l.table = call.read("table", table, Type::f64, l.count * pair_columns).as<double>();
  call.run([&] { cpu::pair_link(l); }, [&](auto &queue) { cuda::pair_link(l, queue); });
}

} // namespace

void bind_pair_link(py::module_ &m) {
  m.attr("LINK_FUNCTIONS") = words(LinkFunction_words);
  m.attr("PAIR_COLUMNS") = words(PairColumn_words);
  m.def("pair_link", &pair_link);
}

} // namespace tokcredit::bind
