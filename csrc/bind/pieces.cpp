#include "ops/pieces.hpp"
#include "bind/module.hpp"

namespace tokcredit::bind {
namespace {

Rows marked_rows(Call &call, const py::object &marks, const py::object &begin, const py::object &end) {
  const Array given = call.read("marks", marks);
  return call.rows(begin, end, marks, given.size);
}

void piece_offsets(const py::object &marks, const py::object &begin, const py::object &end, int cut,
                   const py::object &offset) {
  Call call("piece_offsets");
  const Rows rows = marked_rows(call, marks, begin, end);
  const PieceOffsets p{rows, call.one_of<Cut>("cut", cut, Cut_words),
                       call.read("offset", offset, Type::i64, rows.count + 1).as<int64_t>()};
  call.run([&] { cpu::piece_offsets(p); }, [&](auto &queue) { cuda::piece_offsets(p, queue); });
}

void pieces(const py::object &marks, const py::object &begin, const py::object &end, const py::object &offset,
            int cut, const py::object &piece_begin, const py::object &piece_end, const py::object &row,
            const py::object &at) {
  Call call("pieces");
  const Rows rows = marked_rows(call, marks, begin, end);
  const Array first = call.read("piece_begin", piece_begin);
  if (first.type != Type::i64)
    call.fail("piece_begin", "int64", name_of(first.type));
  const Pieces p{rows,
                 call.one_of<Cut>("cut", cut, Cut_words),
                 call.read_as<int64_t>("offset", offset, Type::i64, rows.count + 1),
                 first.size,
                 first.as<int64_t>(),
                 call.read("piece_end", piece_end, Type::i64, first.size).as<int64_t>(),
                 call.read("row", row, Type::i64, first.size).as<int64_t>(),
                 call.read("at", at, Type::i64, first.size).as<int64_t>()};
  call.run([&] { cpu::pieces(p); }, [&](auto &queue) { cuda::pieces(p, queue); });
}

} // namespace

void bind_pieces(py::module_ &m) {
  m.attr("CUTS") = words(Cut_words);
  m.def("piece_offsets", &piece_offsets);
  m.def("pieces", &pieces);
}

} // namespace tokcredit::bind
