#include "bind/module.hpp"
#include <pybind11/stl.h>

namespace tokcredit::bind {
namespace {

const char *cpu_level() {
#ifdef TOKCREDIT_LEVELS
  return __builtin_cpu_supports("x86-64-v4")   ? "x86-64-v4"
         : __builtin_cpu_supports("x86-64-v3") ? "x86-64-v3"
                                               : "x86-64";
#else
  return "generic";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = TOKCREDIT_COMPILER;
  info["cpu_level"] = cpu_level();
#ifdef TOKCREDIT_CUDA
  info["cuda"] = true;
  info["cuda_architectures"] = TOKCREDIT_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_architectures"] = "";
#endif
  return info;
}

} // namespace

py::tuple words(const char *words) { return py::tuple(py::cast(split(words))); }

} // namespace tokcredit::bind

PYBIND11_MODULE(_C, m) {
  using namespace tokcredit::bind;
  m.doc() = "Native operations of tokcredit; contracts in csrc/ops.";
  m.def("build_info", &build_info);
  bind_scan(m);
  bind_tree(m);
  bind_tree_pack(m);
  bind_segment(m);
  bind_select(m);
  bind_diverse(m);
  bind_policy_loss(m);
  bind_logits(m);
  bind_divergence(m);
  bind_repack(m);
  bind_baseline(m);
  bind_pieces(m);
  bind_pair_link(m);
  bind_row_weights(m);
  bind_score(m);
  bind_memory(m);
}
