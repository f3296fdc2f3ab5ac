"""Known bugs in copies of the kernels, which the fuzz must see: ``python -m tests.emulation.seeded_bugs``.

Results: each of the 92 bugs has been seen. The 36 that concern what has changed last were run on the kernels as they
are, the others on earlier ones, "a bound per token is taken from the row" only with ``--seconds 70``.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .build import ROOT, build, build_library, kernel_objects


@dataclass
class Bug:
    """``old`` occurs once in ``file``, and becomes ``new``; the fuzz of ``ops``, with its options, must see it."""

    name: str
    file: str
    old: str
    new: str
    ops: str

    @property
    def sources(self):
        """The kernels to compile: the file, or those of the operations that include it."""
        kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
        ops = self.ops.split()
        concerned = [p.name for p in kernels if any(op.startswith(p.stem) or op.endswith(p.stem) for op in ops)]
        return [self.file] if self.file.endswith(".cu") else concerned


BUGS = [
    Bug("a turn is read before it is drawn", "chain.cuh", "    __syncthreads();\n", "", "scan"),
    Bug("blocks wait for blocks that may not run", "chain.cuh", "atomicAdd(ticket, 1ull)", "blockIdx.x", "scan"),
    Bug("a state is published without release", "chain.cuh", "memory_order_release", "memory_order_relaxed", "scan"),
    Bug("a state is read without acquire", "chain.cuh", "memory_order_acquire,", "memory_order_relaxed,", "scan"),
    Bug("the look-back skips places", "chain.cuh", "(1u << max(nearest, 0)) - 1", "0", "scan policy_loss"),
    Bug("flags are not cleared", "chain.cuh", "    clear(op, queue, ticket, bytes);\n", "", "scan policy_loss"),
    Bug(
        "a place in the middle of a row publishes nothing",
        "scan.cu",
        "        chain.publish(turn, Chain<Affine>::carry, {1, in.then(all.affine).shift});\n",
        "        (void)in;\n",
        "scan --long",
    ),
    Bug(
        "totals of warps are read too soon",
        "scan.cu",
        "beginning != 0};\n  __syncthreads();\n",
        "beginning != 0};\n",
        "scan",
    ),
    Bug(
        "the state that arrived is read too soon",
        "scan.cu",
        "in.shift;\n  }\n  __syncthreads();\n",
        "in.shift;\n  }\n",
        "scan",
    ),
    Bug(
        "results are stored before all are there",
        "scan.cu",
        "  __syncwarp();\n  staged.store",
        "  staged.store",
        "scan",
    ),
    Bug("a state crosses the border of a row", "scan.cu", "if (step <= reach)", "if (step <= lane_id())", "scan"),
    Bug(
        "a collective is called by some lanes only",
        "scan.cu",
        "    const Affine before = from_lane(upto, max(lane_id() - step, 0));\n    if (step <= reach)\n",
        "    if (step > reach)\n      continue;\n    const Affine before = from_lane(upto, lane_id() - step);\n",
        "scan",
    ),
    Bug(
        "borders are set before they are cleared",
        "lane.cuh",
        "= borders.last[lane_id()] = 0;\n  __syncwarp();\n",
        "= borders.last[lane_id()] = 0;\n",
        "scan",
    ),
    Bug(
        "borders are read before they are set",
        "lane.cuh",
        "first_row = low;\n  __syncwarp();\n",
        "first_row = low;\n",
        "scan",
    ),
    Bug("sixteen tokens are loaded past the end", "lane.cuh", "t + own_tokens <= size) {", "t < size) {", "scan"),
    Bug(
        "sixteen tokens are loaded from an odd address",
        "lane.cuh",
        "(reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(mask)) % 16 == 0",
        "true",
        "scan",
    ),
    Bug(
        "a part lies in the slot of another row",
        "segment.cu",
        "part_of(place, !starts)",
        "part_of(place, starts)",
        "segment_rows",
    ),
    Bug("a row starts with what the last one left", "segment.cu", "        seen = {};\n", "", "segment_rows"),
    Bug(
        "a short row has what lies around it",
        "segment.cu",
        "unmasked & bits_between(first, last)",
        "unmasked & bits_between(0, held)",
        "segment_rows",
    ),
    Bug(
        "weights count twice",
        "segment.cu",
        "begin + lane_id(), end, 32",
        "begin + lane_id(), end, 31",
        "weighted_moments",
    ),
    Bug(
        "a number is standardized past the end",
        "segment.cu",
        "  if (i >= s.size)\n",
        "  if (i > s.size)\n",
        "standardize",
    ),
    Bug(
        "four tokens are loaded past the end",
        "tile.cuh",
        "if (aligned && t + quad <= size)",
        "if (aligned && t < size)",
        "scale_rows",
    ),
    Bug(
        "sums along a row are read too soon",
        "policy_loss_piece.cuh",
        "x[v + 2], x[v + 3]}};\n    __syncwarp();\n",
        "x[v + 2], x[v + 3]}};\n",
        "policy_loss",
    ),
    Bug(
        "a token that a bound stops is counted twice",
        "policy_loss_clip.cuh",
        "  below += !reaches;\n",
        "  below += !moves;\n",
        "policy_loss",
    ),
    Bug("counts of a histogram are lost", "select.cu", "            __syncwarp();\n", "", "select"),
    Bug(
        "histograms are cleared while they are read",
        "select.cu",
        "        own[b] = 0;\n      }\n    __syncwarp();\n",
        "        own[b] = 0;\n      }\n",
        "select",
    ),
    Bug(
        "histograms start with what was there",
        "select.cu",
        "  if (i < size)\n    counts[i] = 0;\n",
        "",
        "select",
    ),
    Bug(
        "a digit is chosen before all blocks have counted",
        "select.cu",
        "memory_order_acq_rel",
        "memory_order_relaxed",
        "select",
    ),
    Bug(
        "blocks that have counted are not forgotten",
        "select.cu",
        "pass, counts);\n  if (threadIdx.x == 0)\n    *finished = 0;\n",
        "pass, counts);\n",
        "select",
    ),
    Bug(
        "a goal changes while it is read",
        "select.cu",
        "  __syncwarp(); // all lanes have read the goal that one of them will change\n",
        "",
        "select",
    ),
    Bug(
        "sums of a block are used again too soon",
        "tree.cu",
        "  __syncthreads(); // the sums are used again\n",
        "",
        "tree_build",
    ),
    Bug(
        "owners are compared while they are chosen",
        "tree.cu",
        "count, first)];\n    }\n    __syncthreads();\n",
        "count, first)];\n    }\n",
        "tree_build",
    ),
    Bug(
        "a depth changes while it is read",
        "tree.cu",
        "      __syncwarp(); // all lanes have read the old depth\n",
        "",
        "tree_build",
    ),
    Bug(
        "rows are merged into runs that are not there yet",
        "tree.cu",
        "+ passed] = place;\n      }\n      __syncthreads();\n",
        "+ passed] = place;\n      }\n",
        "tree_build",
    ),
    Bug(
        "nodes are counted before they are written",
        "tree.cu",
        "      b.leaf[r] = leaf;\n    }\n    __syncthreads();\n",
        "      b.leaf[r] = leaf;\n    }\n",
        "tree_build",
    ),
    Bug(
        "nodes are summed before all groups have theirs",
        "tree.cu",
        "memory_order_acq_rel",
        "memory_order_relaxed",
        "tree_build",
    ),
    Bug(
        "groups are counted from what was there",
        "tree.cu",
        "      starts[b.groups] = R;\n      *finished = 0;\n",
        "      starts[b.groups] = R;\n",
        "tree_build",
    ),
    Bug(
        "nodes are written before they have numbers",
        "tree.cu",
        "  if (b.rows.count > few_rows)\n    return;\n  __syncthreads();\n",
        "  if (b.rows.count > few_rows)\n    return;\n",
        "tree_build",
    ),
    Bug(
        "two rows of a group have one place",
        "tree.cu",
        "place += group < own || (group == own && k < r);",
        "place += group < own || (group == own && k < r - 1);",
        "tree_build",
    ),
    Bug(
        "a token that differs is shared",
        "prefix.cuh",
        "first = unsigned((u * 32 + lane_id()) * width + k);",
        "first = unsigned((u * 32 + lane_id()) * width + k) + 1;",
        "tree_build",
    ),
    Bug("a node is summed before its children", "fold.cu", "memory_order_acq_rel", "memory_order_relaxed", "tree_fold"),
    Bug(
        "children are counted from what was there",
        "fold.cu",
        "  for (int64_t v = threadIdx.x; v < f.capacity; v += sorting_threads)\n    finished[v] = 0;\n",
        "",
        "tree_fold",
    ),
    Bug(
        "the last vector passes the end of a run",
        "expand.cu",
        "(last - body) / width",
        "(last - body + width - 1) / width",
        "expand",
    ),
    Bug(
        "sixteen bytes are cut out of what lies past the end",
        "repack.cu",
        "t + moved - by + 2 * width <= size",
        "t + moved - by + width <= size",
        "repack",
    ),
    Bug(
        "a logit of a row is lost",
        "vector.cuh",
        "i = head + runs * Vector<T>::width + threadIdx.x",
        "i = head + runs * Vector<T>::width + threadIdx.x + 1",
        "logits logits_gradient",
    ),
    Bug(
        "a narrow gradient lies over logits that are not read yet",
        "logits.cu",
        "      __syncthreads();\n      if (n == width) {",
        "      if (n == width) {",
        "logits_gradient",
    ),
    Bug(
        "a row of a group is left out",
        "baseline.cu",
        "int64_t m = members.starts[g]; m < end",
        "int64_t m = members.starts[g] + 1; m < end",
        "baseline",
    ),
    Bug(
        "a total is published as a carry",
        "policy_loss.cu",
        "begins ? Chain<Running>::carry : Chain<Running>::total, own",
        "Chain<Running>::carry, own",
        "policy_loss",
    ),
    Bug(
        "a place in the middle of a row publishes no sums",
        "policy_loss.cu",
        "            chain->publish(place, Chain<Running>::carry, in.then(own));\n",
        "            (void)0;\n",
        "policy_loss --long",
    ),
    Bug(
        "a row is written before its parts are merged",
        "policy_loss.cu",
        "const bool whole = begins && ends;",
        "const bool whole = begins;",
        "policy_loss",
    ),
    Bug(
        "stats lie in the slot of another row",
        "policy_loss.cu",
        "part_of(place, !begins)",
        "part_of(place, begins)",
        "policy_loss",
    ),
    Bug(
        "a row starts with the stats of another",
        "policy_loss.cu",
        "part_of(k, k > first)",
        "part_of(k, true)",
        "policy_loss",
    ),
    Bug(
        "slopes between rows are not written",
        "policy_loss.cu",
        "          fill_zero(slopes, first, last);\n",
        "          (void)(first + last);\n",
        "policy_loss",
    ),
    Bug(
        "sums are overwritten while the row before reads them",
        "policy_loss_piece.cuh",
        "    __syncwarp(); // all lanes have read those of the row before\n",
        "",
        "policy_loss",
    ),
    Bug(
        "four slopes are stored at an odd address",
        "policy_loss_call.cuh",
        "plain(aligned && quads_aligned(static_cast<const A *>(p.slopes)))",
        "plain(aligned)",
        "policy_loss",
    ),
    Bug(
        "a bound per token is taken from the row",
        "policy_loss_call.cuh",
        "quads_aligned(static_cast<const A *>(o.data)) && i < varying_count",
        "quads_aligned(static_cast<const A *>(o.data))",
        "policy_loss",
    ),
    Bug(
        "a log-ratio outside the clamp has an exponential",
        "policy_loss_piece.cuh",
        "usual &= std::fabs(x[k]) <= call.reach;",
        "usual &= x[k] == x[k];",
        "policy_loss",
    ),
    Bug(
        "a factor reaches the next row",
        "scale_rows.cu",
        "store_quad(y, t, first, last,",
        "store_quad(y, t, first, s.rows.size,",
        "scale_rows",
    ),
    Bug("factors are read past their end", "scale_rows.cu", "s.per_row ? r : 0", "s.per_row ? r + 1 : 0", "scale_rows"),
    Bug(
        "the normalizers of both are read too soon",
        "divergence.cu",
        "  if constexpr (has_mixture(kind)) {\n    __syncthreads();\n",
        "  if constexpr (has_mixture(kind)) {\n",
        "divergence",
    ),
    Bug(
        "a teacher is loaded from an odd address",
        "divergence.cu",
        "place(student) == place(teacher) && place(student) == place(result)",
        "place(student) == place(result)",
        "divergence",
    ),
    Bug(
        "the slope of a mixture is not kept",
        "divergence.cu",
        "      saved[2] = sum.slope;\n",
        "",
        "divergence",
    ),
    Bug(
        "the slope of a large probability is another's",
        "divergence.cu",
        "row.student_at(j + at), row.teacher_at(j + at)",
        "row.student_at(j), row.teacher_at(j)",
        "divergence_gradient",
    ),
    Bug(
        "ids are sorted before all are there",
        "divergence_top.cu",
        "    __syncthreads();\n    for (int a = threadIdx.x; a < in.top; a += threads) {\n      int rank",
        "    for (int a = threadIdx.x; a < in.top; a += threads) {\n      int rank",
        "divergence_top",
    ),
    Bug(
        "ids are searched before they are sorted",
        "divergence_top.cu",
        "    __syncthreads();\n    return sorted[0] >= 0;",
        "    return sorted[0] >= 0;",
        "divergence_top",
    ),
    Bug(
        "the sums outside of the ids are used again too soon",
        "divergence_top.cu",
        "  __syncthreads(); // scratch is used again\n",
        "",
        "divergence_top",
    ),
    Bug(
        "the normalizer is read too soon",
        "divergence_top.cu",
        "  __syncthreads();\n  const auto log_p = ",
        "  const auto log_p = ",
        "divergence_top",
    ),
    Bug(
        "the masses of the ids are read too soon",
        "divergence_top.cu",
        "    inside = masses;\n  __syncthreads();\n",
        "    inside = masses;\n",
        "divergence_top",
    ),
    Bug(
        "the sum of all outcomes is read too soon",
        "divergence_top.cu",
        "  __syncthreads();\n  for (int a = threadIdx.x; a < top; a += threads) {\n    int first = 0;",
        "  for (int a = threadIdx.x; a < top; a += threads) {\n    int first = 0;",
        "divergence_top",
    ),
    Bug(
        "slopes of ids are overwritten by what is outside of them",
        "divergence_top.cu",
        "  __syncthreads();\n  if (!reads)\n",
        "  if (!reads)\n",
        "divergence_top_gradient",
    ),
    Bug(
        "an id counts among the others as well",
        "divergence_top.cu",
        "int at = ids.from(j, top)",
        "int at = ids.from(j + 1, top)",
        "divergence_top",
    ),
    Bug(
        "logits are loaded where the gradient would be aligned",
        "divergence_top.cu",
        "(reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(grad)) % 16 == 0",
        "true",
        "divergence_top_gradient",
    ),
    Bug(
        "moments of lanes are merged before they are there",
        "score.cu",
        "d.rows.count));\n  __syncwarp();\n",
        "d.rows.count));\n",
        "log_deviation",
    ),
    Bug("the last moments are left out", "score.cu", "m.merge(part[lane])", "m.merge(part[lane - 1])", "log_deviation"),
    Bug(
        "the rank of the quantile is not published",
        "score.cu",
        "  *rank = nearest_rank(d.quantile, m.count);\n",
        "",
        "log_deviation",
    ),
    Bug(
        "a number is stored past the end",
        "score.cu",
        "store_quad(p, t, 0, size, aligned, x)",
        "store_quad(p, t, 0, size + 1, aligned, x)",
        "score_bounds",
    ),
    Bug(
        "the upper bounds are the lower ones",
        "score.cu",
        "above = s.low_bound ? high.load(t)",
        "above = s.low_bound ? low.load(t)",
        "score_factor",
    ),
    Bug(
        "a run goes on from the wrong lane",
        "pieces.cu",
        "(lane_id() + 31) % 32",
        "(lane_id() + 1) % 32",
        "piece_offsets",
    ),
    Bug(
        "a run ends where a tile does",
        "pieces.cu",
        "    last = __shfl_sync(all_lanes, marked >> (own_tokens - 1), 31);\n",
        "",
        "piece_offsets",
    ),
    Bug(
        "a last run has no end",
        "pieces.cu",
        "    over(end, count - 1);\n",
        "    (void)over;\n",
        "pieces",
    ),
    Bug(
        "the number of all pieces is not published",
        "pieces.cu",
        "    p.offset[p.rows.count] = sum;\n",
        "    (void)sum;\n",
        "piece_offsets",
    ),
    Bug("pieces of rows before are forgotten", "pieces.cu", "    sum += all;\n", "    sum = all;\n", "piece_offsets"),
    Bug(
        "only some lanes add up",
        "pieces.cu",
        "    const T other = __shfl_sync(all_lanes, sum, lane_id() >= step ? lane_id() - step : lane_id());\n"
        "    sum += lane_id() >= step ? other : T(0);\n",
        "    if (lane_id() >= step)\n      sum += __shfl_sync(all_lanes, sum, lane_id() - step);\n",
        "piece_offsets",
    ),
    Bug(
        "rows of no scope are in the first",
        "maximum_variance.cu",
        "g >= 0 && g < m.scopes ? g : m.scopes",
        "g >= 0 && g < m.scopes ? g : 0",
        "maximum_variance",
    ),
    Bug(
        "rows are chosen from what was there",
        "maximum_variance.cu",
        "  clear(op, queue, m.chosen, m.rows);\n",
        "",
        "maximum_variance",
    ),
    Bug("tokens without a part have the key of before", "within_mean.cu", "    keys[t] = none;\n", "", "within_mean"),
    Bug("a mean is of one token less", "within_mean.cu", "double(middle + 1)", "double(middle)", "within_mean"),
    Bug(
        "tokens without a part are chosen",
        "within_mean.cu",
        "keys[i] != none && (i < search->first_out || i < w.least)",
        "i < search->first_out || i < w.least",
        "within_mean",
    ),
    Bug(
        "candidates of a step are compared with what was there",
        "diverse.cu",
        "  clear(op, queue, s.best, most * int64_t(sizeof *s.best));\n",
        "",
        "diverse",
    ),
    Bug("the last choice is not compared", "diverse.cu", "seen < step)", "seen < step - 1)", "diverse"),
    Bug(
        "lanes go different ways",
        "diverse.cu",
        "  known = __shfl_sync(all_lanes, known, 0);\n",
        "",
        "diverse",
    ),
    Bug(
        "groups begin before rows are sorted",
        "sort.cuh",
        "  __syncthreads();\n  for (int64_t k = threadIdx.x; k <= count;",
        "  for (int64_t k = threadIdx.x; k <= count;",
        "tree_fold",
    ),
]


def mutated(bug, folder):
    """A copy of the tree with the bug."""
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "csrc/cuda" / bug.file
    text = path.read_text()
    if text.count(bug.old) != 1:
        raise SystemExit(f"{bug.name}: expected one place in {bug.file}, found {text.count(bug.old)}")
    path.write_text(text.replace(bug.old, bug.new))
    return folder


def seen(bug, binding, seconds):
    """What the fuzz said first, or None."""
    with tempfile.TemporaryDirectory() as folder:
        changed = kernel_objects("instrumented", mutated(bug, Path(folder)), bug.sources)
        library = build_library("instrumented", Path(folder) / "out", changed)
        module = shutil.copy(binding, library.parent)
        command = [sys.executable, "-m", "tests.emulation.fuzz", "--no-junk", "--most", "1", "--module", str(module)]
        command += ["--seconds", str(seconds), "--ops", *bug.ops.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            return None
        if done.returncode < 0:
            return f"killed by signal {-done.returncode}"
        findings = [line for line in done.stdout.splitlines() if line.startswith("case")]
        if not findings:
            raise SystemExit(f"{bug.name}: the fuzz did not run:\n{done.stderr}")
        return findings[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of fuzz for each bug")
    parser.add_argument("--only", nargs="+", default=[""], help="bugs whose name or file contains one of these")
    a = parser.parse_args()
    missed, start, binding = [], time.monotonic(), build("instrumented")
    chosen = [bug for bug in BUGS if any(part in f"{bug.file}: {bug.name}" for part in a.only)]
    for bug in chosen:
        found = seen(bug, binding, a.seconds)
        print(f"{'seen  ' if found else 'MISSED'} {bug.name}: {found}", flush=True)
        missed += [] if found else [bug.name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} bugs seen in {time.monotonic() - start:.0f} s")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
