"""Known bugs in copies of the kernels, which the fuzz must see: ``python -m tests.emulation.seeded_bugs``.

Result of the last run, with 30 seconds for each: 32 of 32 bugs seen, in 231 s.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .build import ROOT, build, build_kernels


@dataclass
class Bug:
    """``old`` occurs once in ``file``, and becomes ``new``; the fuzz of ``ops``, with its options, must see it."""

    name: str
    file: str
    old: str
    new: str
    ops: str


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
        "four tokens are loaded past the end",
        "tile.cuh",
        "if (aligned && t + quad <= size)",
        "if (aligned && t < size)",
        "scale_rows",
    ),
    Bug(
        "sums along a row are read too soon",
        "policy_loss_running.cuh",
        "= four;\n    }\n    __syncwarp();\n",
        "= four;\n    }\n",
        "policy_loss",
    ),
    Bug(
        "a token that a bound stops is counted twice",
        "policy_loss_clip.cuh",
        "      count_if(!reaches, below);\n",
        "      count_if(!moves, below);\n",
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
        "    b.leaf[r] = leaf;\n  }\n  __syncthreads();\n",
        "    b.leaf[r] = leaf;\n  }\n",
        "tree_build",
    ),
    Bug(
        "nodes are summed before all groups have theirs",
        "tree.cu",
        "memory_order_acq_rel",
        "memory_order_relaxed",
        "tree_build",
    ),
    Bug("groups are counted from what was there", "tree.cu", "    *finished = 0;\n", "    ;\n", "tree_build"),
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
        "a slope reads what another thread writes",
        "logits.cu",
        "    if (unsigned(chosen - j) < unsigned(width)) {",
        "    if (chosen >= 0) {",
        "logits_gradient",
    ),
    Bug(
        "a row of a group is left out",
        "baseline.cu",
        "int64_t m = members.starts[g]; m < end",
        "int64_t m = members.starts[g] + 1; m < end",
        "baseline",
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
        library = build_kernels("instrumented", mutated(bug, Path(folder)), Path(folder) / "out")
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
    parser.add_argument("--only", default="", help="bugs whose name contains this")
    a = parser.parse_args()
    missed, start, binding = [], time.monotonic(), build("instrumented")
    chosen = [bug for bug in BUGS if a.only in bug.name]
    for bug in chosen:
        found = seen(bug, binding, a.seconds)
        print(f"{'seen  ' if found else 'MISSED'} {bug.name}: {found}", flush=True)
        missed += [] if found else [bug.name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} bugs seen in {time.monotonic() - start:.0f} s")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
