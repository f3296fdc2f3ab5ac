#include "ops/pieces.hpp"
#include <cstring>
#include <stdexcept>

namespace tokcredit::cpu {
namespace {

// The first token of [from, end) that is marked, or with `marked` false is not; `end` if there is none.
int64_t next(const bool *marks, int64_t from, int64_t end, bool marked) {
  const void *found = from < end ? std::memchr(marks + from, marked, size_t(end - from)) : nullptr;
  return found ? static_cast<const bool *>(found) - marks : end;
}

// Calls piece(begin, end, at) for the pieces of a row, in order.
template <class Piece> void each(const Rows &rows, Cut cut, int64_t r, Piece &&piece) {
  const bool *marks = rows.mask;
  const int64_t end = rows.end[r];
  int64_t from = rows.begin[r];
  if (cut == Cut::runs) {
    for (int64_t last; (from = next(marks, from, end, true)) < end; from = last) {
      last = next(marks, from, end, false);
      piece(from, last, from);
    }
    return;
  }
  int64_t before = -1;
  for (int64_t at = next(marks, from, end, true); at < end; at = next(marks, at + 1, end, true)) {
    const int64_t border = cut == Cut::after ? at + 1 : at;
    piece(from, border, cut == Cut::after ? at : before);
    from = border;
    before = at;
  }
  piece(from, end, cut == Cut::after ? -1 : before);
}

} // namespace

void piece_offsets(const PieceOffsets &p) {
  int64_t count = 0;
  for (int64_t r = 0; r < p.rows.count; ++r) {
    p.offset[r] = count;
    each(p.rows, p.cut, r, [&](int64_t, int64_t, int64_t) { ++count; });
  }
  p.offset[p.rows.count] = count;
}

void pieces(const Pieces &p) {
  int64_t i = 0;
  bool fits = true;
  for (int64_t r = 0; r < p.rows.count; ++r) {
    fits = fits && p.offset[r] == i;
    each(p.rows, p.cut, r, [&](int64_t begin, int64_t end, int64_t at) {
      if ((fits = fits && i < p.count)) {
        p.begin[i] = begin;
        p.end[i] = end;
        p.row[i] = r;
        p.at[i++] = at;
      }
    });
  }
  if (!fits || i != p.count)
    throw std::invalid_argument("pieces: offset: expected those of piece_offsets, got others");
}

} // namespace tokcredit::cpu
