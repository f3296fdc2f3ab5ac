// One function per operation adds it to the module.
#pragma once
#include "bind/array.hpp"

namespace tokcredit::bind {

void bind_scan(py::module_ &);
void bind_tree(py::module_ &);
void bind_tree_pack(py::module_ &);
void bind_segment(py::module_ &);
void bind_select(py::module_ &);
void bind_diverse(py::module_ &);
void bind_policy_loss(py::module_ &);
void bind_logits(py::module_ &);
void bind_divergence(py::module_ &);
void bind_repack(py::module_ &);
void bind_baseline(py::module_ &);
void bind_pieces(py::module_ &);
void bind_pair_link(py::module_ &);
void bind_row_weights(py::module_ &);
void bind_score(py::module_ &);
void bind_memory(py::module_ &);

// A tuple of the words of an enumeration made by TOKCREDIT_ENUM, in its order.
py::tuple words(const char *words);

// float64 computes in itself, every other float type in float32.
inline Type accumulated(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

} // namespace tokcredit::bind
