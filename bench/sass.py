"""What the machine code of the kernels says about their speed, without a GPU.

Run: ``python bench/sass.py FOLDER > bench/sass.txt`` on a folder with compiled objects, such as the build folder of
``cmake --preset ci -DCMAKE_CUDA_ARCHITECTURES="80-real;90-real;100-real"``. It needs ``cuobjdump`` and ``nvdisasm``,
from the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm. ``--check`` prints nothing but what is wrong: kernels
that keep something in local memory, as spilled registers are, or that have lost their stores of 16 bytes.

For a kernel that streams, the instructions are those of a warp on its way through the loop over its tokens, or through
the kernel if it has no such loop, without slow cases: the way with most accesses of 16 bytes and most of its
arithmetic, and of those the shortest. Where a tile goes through a short loop a few times (policy_loss, segment, expand,
repack), what comes before and after it counts as well. A mask is read. What warps of a block do for each other (in scan
about 50 instructions per tile) is left out. The model lets every SM issue 2.5 instructions per clock and divides the
bytes that a warp moves by the time of its instructions; the share is of what a copy reaches. It knows nothing of
latency.
"""

import argparse
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

IPC = 2.5

# Of the device with this architecture: SMs, GHz, bytes per second that a copy reads and writes.
DEVICES = {"80": ("A100", 108, 1.41, 1.7e12), "90": ("H200", 132, 1.85, 4.3e12), "100": ("B200", 148, 1.85, 7.0e12)}


@dataclass
class Stream:
    """What a warp does in one pass: items (tokens or logits), bytes read and written per item, has it a loop."""

    kernel: str
    items: int
    bytes: float
    loop: bool = True
    stores: bool = True  # whether it must have stores of 16 bytes
    work: str = ""  # what the way must not leave out
    turns: int = 0  # how often a tile goes through the loop, where what is around it counts
    slow: str = ""  # what the way through the loop must not meet
    once: str = ""  # what it meets in one of its turns only


# Kinds of segment's reductions (sum, var, logsumexp, moments), and what each does to every token.
REDUCTIONS = {0: "DADD", 2: "DADD|DFMA", 6: "MUFU.EX2", 7: "DADD|DFMA"}

# What clip does to every token, what soft and the estimators of a divergence do, and what a step does that must go
# token by token.
CLIP, SHARED, SLOW = "FFMA|MUFU.EX2|DADD", "FADD|FFMA|MUFU", r"FSETP.NEU|SHFL.IDX P[^ ]* R\d+, R\d+, R\d"

# What a tile inside a row does that clips cumulative ratios: it reads masks, waits for the sum of the row, publishes
# the next and takes exponentials four neighbours at a time.
ALONG = r"LDG.E R\d+, .*\+0x(80|100|180)\]|CCTL.IVALL|ST.E.STRONG.GPU|FFMA.*1\.90465"

STREAMS = {
    "logits": [
        Stream(r"forward<bf16, 512, false>", 512, 2, stores=False),
        Stream(r"forward<float, 512, false>", 256, 4, stores=False),
        Stream(r"backward<bf16, bf16, false>", 512, 4),
        Stream(r"backward<float, float, false>", 256, 8),
        Stream(r"backward<float, bf16, false>", 256, 6),
    ],
    # From a mixture of two teachers: three rows are read. Of Jensen-Shannon's two passes over the rows the first.
    "divergence": [
        Stream("forward<0, bf16, 256>", 512, 6, stores=False),
        Stream("forward<2, bf16, 256>", 512, 6, stores=False),
        Stream("backward<0, bf16, 256>", 512, 8, work="MUFU"),
        Stream("backward<1, bf16, 256>", 512, 8, work="MUFU"),
        Stream("backward<2, bf16, 256>", 512, 8, work="MUFU"),
    ],
    "segment": [
        *(
            Stream(f"reduce_tiles<float, {kind}>", 2048, 5, stores=False, work=work, turns=4, once="REDUX")
            for kind, work in REDUCTIONS.items()
        ),
        *(
            Stream(f"reduce_tiles<bf16, {kind}>", 2048, 3, stores=False, work=work, turns=4, once="REDUX")
            for kind, work in REDUCTIONS.items()
        ),
    ],
    "expand": [
        Stream("expand_tiles<float>", 4096, 5, work="LDG", turns=8),
        Stream("expand_tiles<double>", 2048, 9, work="LDG", turns=8),
    ],
    # Of bytes, from an address that does not allow to load what is stored.
    "repack": [Stream("repack_tiles", 4096, 2, work="SHF", turns=2)],
    "policy_loss": [
        Stream("policy_loss_tiles<0, float, true>", 512, 13, True, True, f"{CLIP}|LDG.E R", 4, SLOW),
        Stream("policy_loss_tiles<0, bf16, true>", 512, 9, True, True, f"{CLIP}|LDG.E R", 4, SLOW),
        Stream("policy_loss_alike<float>", 512, 9, True, True, f"{CLIP}|LDG.E R", 4, SLOW),
        Stream("policy_loss_alike<bf16>", 512, 7, True, True, f"{CLIP}|LDG.E R", 4, SLOW),
        Stream("policy_loss_chained<0, float>", 512, 13, False, work=ALONG),
        Stream("policy_loss_chained<0, bf16>", 512, 9, False, work=ALONG),
        *(
            Stream(f"policy_loss_tiles<{kind}, {dtype}, true>", 512, size, True, True, f"{SHARED}|LDG.E R", 4, SLOW)
            for kind in (1, 3)  # soft; estimators of a divergence
            for dtype, size in (("float", 13), ("bf16", 9))
        ),
    ],
    # Of two rows' tokens, of which those of the group's first row come from the cache.
    "tree": [
        Stream("compare_few<int>", 512, 4, stores=False),
        Stream("compare_few<long>", 256, 8, stores=False),
    ],
    "scan": [
        Stream("scan_tiles<float, false>", 512, 9, False),
        Stream("scan_tiles<bf16, false>", 512, 7, False),
        Stream("scan_tiles<double, false>", 512, 17, False),
    ],
}


@dataclass
class Instruction:
    address: int
    text: str
    target: str | None


def tool(name):
    """Path of a tool that reads binaries."""
    found = shutil.which(name)
    packaged = sorted(Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/*/bin/{name}"))
    if not found and not packaged:
        raise SystemExit(f"{name}: expected on the path or from `pip install nvidia-cuda-{name}`, found neither")
    return found or str(packaged[-1])


def said(*command, folder=None):
    """What a command prints."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def short(name):
    name = re.sub(r"tokcredit::|cuda::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\((Surrogate|Reduction|Divergence)\)", "", name).split("(")[0]


def demangled(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(short, done.stdout.splitlines()), strict=True))


def cubins(objects, folder):
    """Files of machine code by source and architecture, taken out of compiled objects into ``folder``."""
    found = {}
    for path in sorted(objects.rglob("*.cu.o")):
        into = Path(folder, path.name)
        into.mkdir()
        said(tool("cuobjdump"), "--extract-elf", "all", str(path.resolve()), folder=into)
        for cubin in into.glob("*.cubin"):
            found[path.name.removesuffix(".cu.o"), cubin.suffixes[-2].removeprefix(".sm_")] = str(cubin)
    return found


def usage_of(cubin):
    """Registers, shared bytes and bytes of local memory by mangled name."""
    line = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = re.findall(line, said(tool("cuobjdump"), "--dump-resource-usage", cubin))
    return {
        name: (int(registers), int(shared), int(stack) + int(local)) for name, registers, stack, shared, local in found
    }


def code_of(cubin):
    """Instructions and labels of each function of a cubin, and threads per block, from its launch bounds."""
    text = said(tool("nvdisasm"), cubin)
    code, name = {}, None
    for line in text.splitlines():
        if found := re.match(r"\.text\.(\S+):", line):
            name = found[1]
            code[name] = ([], {})
        elif name and (found := re.match(r"(\.L_x_\d+):", line)):
            code[name][1][found[1]] = len(code[name][0])
        elif name and (found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            code[name][0].append(Instruction(int(found[1], 16), found[2].strip(), target and target[1]))
    pattern = r"\.nv\.info\.(\S+?),.*?EIATTR_MAX_THREADS\s+\.align\s+4\s+.*?\.word\s+(0x[0-9a-f]+)"
    threads = {name: int(bound, 16) for name, bound in re.findall(pattern, text, re.S)}
    return code, threads


def wide(instruction, kind):
    return bool(re.search(rf"\b{kind}\S*\.128", instruction.text))


def worth(instructions, work):
    """How much a stretch of code does: accesses of 16 bytes, and instructions that ``work`` matches."""
    accesses = sum(wide(x, "LDG") or wide(x, "STG") for x in instructions)
    return accesses + (sum(bool(re.search(work, x.text)) for x in instructions) if work else 0)


class Graph:
    """Basic blocks of a function, and where each goes on."""

    def __init__(self, instructions, labels):
        # Without a condition the label is all that a branch names; a call of a label is a far branch.
        jump = r"(BRA\S* `|EXIT\b|RET\b|CALL\.REL\.NOINC `\(\.L)"
        branches = [bool(re.search(rf"\b(BRA\b|{jump})", x.text)) for x in instructions]
        starts = sorted({0, *labels.values(), *(i + 1 for i, branch in enumerate(branches) if branch)})
        starts = [i for i in starts if i < len(instructions)]
        self.blocks = [instructions[a:b] for a, b in zip(starts, [*starts[1:], len(instructions)], strict=True)]
        number = {start: n for n, start in enumerate(starts)}
        self.after = []
        for n, block in enumerate(self.blocks):
            last = block[-1]
            always = re.match(jump, last.text)
            after = [] if always or n + 1 == len(self.blocks) else [n + 1]
            if last.target and re.search(r"\b(BRA|CALL)\b", last.text):
                after.append(number[labels[last.target]])
            self.after.append(after)
        self._order()

    def _order(self):
        """Sorts blocks so that edges go forward, but for those that close a loop."""
        done, open_, self.order, self.closing = set(), set(), [], set()
        stack = [(0, iter(self.after[0]))]
        open_.add(0)
        while stack:
            block, rest = stack[-1]
            step = next(rest, None)
            if step is None:
                stack.pop()
                open_.discard(block)
                done.add(block)
                self.order.append(block)
            elif step in open_:
                self.closing.add((block, step))
            elif step not in done:
                open_.add(step)
                stack.append((step, iter(self.after[step])))
        self.order.reverse()

    def best(self, first, inside, ends, work):
        """The way from ``first`` to one of ``ends`` that does most, then the shortest."""
        score, before = {first: (0, 0)}, {}
        for block in self.order:
            if block not in score:
                continue
            code = self.blocks[block]
            score[block] = (score[block][0] + worth(code, work), score[block][1] - len(code))
            for step in self.after[block]:
                if step in inside and (block, step) not in self.closing and score[block] > score.get(step, (-1, 0)):
                    score[step], before[step] = score[block], block
        end = max((e for e in ends if e in score), key=score.get, default=None)
        path = []
        while end is not None:
            path.append(end)
            end = before.get(end)
        return [x for block in reversed(path) for x in self.blocks[block]]

    def blocks_with(self, pattern):
        """The blocks that have an instruction which matches; none if the pattern is empty."""
        return {n for n, code in enumerate(self.blocks) if pattern and any(re.search(pattern, x.text) for x in code)}

    def loop_of(self, last, first):
        """The blocks of the loop that the edge from ``last`` to ``first`` closes."""
        members, new = {first, last}, [last]
        sources = [[a for a, after in enumerate(self.after) if b in after] for b in range(len(self.blocks))]
        while new:
            block = new.pop()
            if block != first:
                fresh = set(sources[block]) - members
                members |= fresh
                new += fresh
        return members


def hot_path(instructions, labels, stream):
    """The instructions on the way through the busiest loop, or through all."""
    graph = Graph(instructions, labels)
    if not stream.loop:
        ends = [n for n, block in enumerate(graph.blocks) if "EXIT" in block[-1].text]
        return graph.best(0, set(graph.order), ends, stream.work)
    slow, once = graph.blocks_with(stream.slow), graph.blocks_with(stream.once)
    loops = []
    for last, first in graph.closing:
        members = graph.loop_of(last, first)
        loops.append((graph.best(first, members - slow - once, [last], stream.work), first, last, members))
    if not stream.turns:
        return max((path for path, *_ in loops), key=lambda path: (worth(path, stream.work), -len(path)), default=[])
    # The innermost of those that store, or where none does of those that load; of several the one that does most.
    kind = "STG" if stream.stores else "LDG"
    loops = [loop for loop in loops if any(wide(x, kind) for x in loop[0])]
    loops = [loop for loop in loops if not any(other[3] < loop[3] for other in loops)]
    if not loops:
        return []
    path, first, last, members = max(loops, key=lambda loop: (worth(loop[0], stream.work), -len(loop[0])))
    turns = path * stream.turns
    if once:
        turns = path * (stream.turns - 1) + graph.best(first, members - slow, [last], f"{stream.work}|{stream.once}")
    rest = set(graph.order) - members
    before = graph.best(0, rest | {first}, [first], stream.work)[: -len(graph.blocks[first])]
    usual = rest - slow
    left = {step for block in members for step in graph.after[block]} & usual
    ends = [n for n, block in enumerate(graph.blocks) if "EXIT" in block[-1].text]
    ways = [graph.best(block, usual, ends, stream.work) for block in left]
    after = max(ways, key=lambda way: worth(way, stream.work), default=[])
    return [*before, *turns, *after]


def rows(architecture, sources):
    """Kernel, registers, shared, local, warps per SM, and for one that streams its pass."""
    _, sms, clock, copy = DEVICES[architecture]
    for source, cubin in sources.items():
        usage, (code, threads) = usage_of(cubin), code_of(cubin)
        names = demangled(list(usage))
        for name in sorted(usage, key=lambda n: names[n]):
            if names[name].startswith("cub::"):
                continue
            registers, shared, local = usage[name]
            if shared and architecture != "80":
                shared -= 1024  # what the system keeps for itself is counted here
            bound = threads.get(name, 256)
            warps = bound // 32
            blocks = min(65536 // (-(-registers // 8) * 8 * bound), 64 // warps, 32)
            if shared:
                blocks = min(blocks, (163 if architecture == "80" else 227) * 1024 // (shared + 1024))
            row = [names[name], registers, shared, local, blocks * warps]
            stream = next((s for s in STREAMS.get(source, []) if s.kernel == names[name]), None)
            if stream:
                path = hot_path(*code[name], stream)
                if not path:
                    raise SystemExit(
                        f"sm_{architecture} {source}: {names[name]}: expected a loop over tokens, found none"
                    )
                loads, stores = (sum(wide(i, kind) for i in path) for kind in ("LDG", "STG"))
                rate = stream.items * stream.bytes / (len(path) / IPC) * sms * clock * 1e9
                row += [len(path) * 128 / stream.items, loads, stores, min(rate / copy, 1)]
            yield source, stream, row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("objects", type=Path)
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        found = cubins(a.objects, folder)
        if not found:
            raise SystemExit(f"objects: expected a folder with compiled .cu files below it, got {a.objects}")
        if not a.check:
            version = re.search(r"V([0-9.]+)", said("nvcc", "--version"))[1]
            print(f"nvcc {version}; instructions per 128 items; accesses of 16 bytes per pass")
        for architecture in sorted({architecture for _, architecture in found}, key=int):
            title = f"sm_{architecture} ({DEVICES[architecture][0]})"
            if not a.check:
                print(f"\n{title:<56}{'registers':>10}{'shared':>8}{'local':>8}{'warps':>7}", end="")
                print(f"{'instr.':>9}{'loads':>7}{'stores':>8}{'copy':>7}")
            sources = {source: cubin for (source, built_for), cubin in found.items() if built_for == architecture}
            for file, stream, row in rows(architecture, sources):
                kernel, registers, shared, local, warps, *measured = row
                label = f"{file}: {kernel}"
                if local:
                    wrong.append(f"sm_{architecture} {label}: {local} bytes of local memory, as for spilled registers")
                if stream and stream.stores and not measured[2]:
                    wrong.append(f"sm_{architecture} {label}: no store of 16 bytes on the way of most tokens")
                if not a.check:
                    line = f"{label:<56}{registers:>10}{shared:>8}{local:>8}{warps:>7}"
                    if measured:
                        line += f"{measured[0]:>9.0f}{measured[1]:>7}{measured[2]:>8}{measured[3]:>7.0%}"
                    print(line, flush=True)
    if a.check:
        print("\n".join(wrong) or "nothing in local memory, and every stream stores 16 bytes at once")
        raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
