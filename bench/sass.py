"""What the machine code of the kernels says about their speed, without a GPU.

Run: ``python bench/sass.py [--architectures 80 90 100] > bench/sass.txt``; needs nvcc, and ``nvdisasm`` from the package
nvidia-cuda-nvdisasm. ``--check`` prints nothing but what is wrong: kernels that spill registers, or that have lost their
stores of 16 bytes.

For a kernel that streams, the instructions are those of one pass through its loop (or through the kernel, if it has no
loop over tokens) on the way without slow cases: the way that makes most accesses of 16 bytes, and of those the shortest.
The model lets every SM issue 2.5 instructions per clock and divides the bytes that a warp moves in a pass by the time
of its instructions; the share is of what a copy reaches. It knows nothing of latency.
"""

import argparse
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-Xcompiler=-Wall,-fPIC"]
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


STREAMS = {
    "logits": [
        Stream(r"forward<bf16, 512>", 512, 2, stores=False),
        Stream(r"forward<float, 512>", 256, 4, stores=False),
        Stream(r"backward<bf16, 512>", 512, 4),
        Stream(r"backward<float, 512>", 256, 8),
    ],
}


@dataclass
class Instruction:
    address: int
    text: str
    target: str | None


def nvdisasm():
    found = shutil.which("nvdisasm")
    packaged = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvdisasm"))
    if not found and not packaged:
        raise SystemExit("nvdisasm: expected on the path or from `pip install nvidia-cuda-nvdisasm`, found neither")
    return found or str(packaged[-1])


def short(name):
    name = re.sub(r"tokcredit::|cuda::|\(anonymous namespace\)::|\((Surrogate|Reduction)\)|^void ", "", name)
    return name.split("(")[0]


def demangled(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(short, done.stdout.splitlines()), strict=True))


def compiled(source, architecture, folder):
    """The cubin, and registers, shared bytes and spilled bytes by mangled name."""
    cubin = f"{folder}/{source.stem}.{architecture}.cubin"
    command = ["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-cubin", str(source), "-o", cubin]
    command += [f"-arch=sm_{architecture}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    usage, kernel, spills = {}, None, 0
    for line in done.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(.*)' for", line):
            kernel = found[1]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = max(spills, int(found[1]), int(found[2]))
        elif kernel and (found := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            usage[kernel] = int(found[1]), int(shared[1]) if shared else 0, spills
            kernel, spills = None, 0
    return cubin, usage


def functions(cubin):
    """Instructions and labels of each function of a cubin."""
    text = subprocess.run([nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True).stdout
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
    return code


def threads_of(cubin, names):
    """Threads per block by mangled name, from the launch bounds in the binary."""
    text = subprocess.run([nvdisasm(), cubin], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\.nv\.info\.(\S+?),.*?EIATTR_MAX_THREADS\s+\.align\s+4\s+.*?\.word\s+(0x[0-9a-f]+)", text, re.S))
    return {name: int(found.get(name, "0x100"), 16) for name in names}


def wide(instruction, kind):
    return bool(re.search(rf"\b{kind}\S*\.128", instruction.text))


def hot_path(instructions, labels, loop):
    """Indices of the instructions on the way through the busiest loop, or through all."""
    count = len(instructions)
    ends = {i for i, x in enumerate(instructions) if x.target or re.search(r"\b(EXIT|RET)\b", x.text)}

    def followers(i):
        text = instructions[i].text
        always = not text.startswith("@") and re.search(r"^(BRA|EXIT|RET)\b", text)
        if not (always and i in ends) and i + 1 < count:
            yield i + 1
        if instructions[i].target and re.search(r"\bBRA\b", text):
            yield labels[instructions[i].target]

    def best(first, last):
        """Most accesses of 16 bytes, then fewest instructions, from ``first`` to ``last`` going forward only."""
        score, before = {first: (0, 0)}, {}
        for i in range(first, last + 1):
            if i not in score:
                continue
            vectors, length = score[i]
            here = (vectors + (wide(instructions[i], "LDG") or wide(instructions[i], "STG")), length - 1)
            score[i] = here
            for j in followers(i):
                if i < j <= last and here > score.get(j, (-1, 0)):
                    score[j], before[j] = here, i
        finals = [last] if loop else [i for i in score if "EXIT" in instructions[i].text]
        end = max((i for i in finals if i in score), key=lambda i: score[i], default=None)
        path = []
        while end is not None:
            path.append(end)
            end = before.get(end)
        return path[::-1]

    if not loop:
        return best(0, count - 1)
    backward = [(labels[x.target], i) for i, x in enumerate(instructions) if x.target and labels[x.target] < i]
    paths = [path for first, last in backward if len(path := best(first, last)) > 2]

    def accesses(path):
        return sum(wide(instructions[i], "LDG") or wide(instructions[i], "STG") for i in path)

    return max(paths, key=lambda path: (accesses(path), -len(path)), default=[])


def rows(architecture, folder):
    """Kernel, registers, shared, spills, warps per SM, and for one that streams its pass."""
    _, sms, clock, copy = DEVICES[architecture]
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        cubin, usage = compiled(source, architecture, folder)
        names, code, threads = demangled(list(usage)), functions(cubin), threads_of(cubin, usage)
        for name in sorted(usage, key=lambda n: names[n]):
            if names[name].startswith("cub::"):
                continue
            registers, shared, spills = usage[name]
            warps = threads[name] // 32
            blocks = min(65536 // (-(-registers // 8) * 8 * threads[name]), 64 // warps, 32)
            if shared:
                blocks = min(blocks, (163 if architecture == "80" else 227) * 1024 // (shared + 1024))
            row = [names[name], registers, shared, spills, blocks * warps]
            stream = next((s for s in STREAMS.get(source.stem, []) if s.kernel == names[name]), None)
            if stream:
                path = [code[name][0][i] for i in hot_path(*code[name], stream.loop)]
                loads, stores = (sum(wide(i, kind) for i in path) for kind in ("LDG", "STG"))
                rate = stream.items * stream.bytes / (len(path) / IPC) * sms * clock * 1e9
                row += [len(path) * 128 / stream.items, loads, stores, min(rate / copy, 1)]
            yield source.stem, stream, row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=["80", "90", "100"], choices=list(DEVICES))
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if not a.check:
        print(f"nvcc {re.search(r'V([0-9.]+)', version)[1]}; instructions per 128 items; accesses of 16 bytes per pass")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in a.architectures:
            title = f"sm_{architecture} ({DEVICES[architecture][0]})"
            if not a.check:
                print(f"\n{title:<56}{'registers':>10}{'shared':>8}{'spills':>8}{'warps':>7}", end="")
                print(f"{'instr.':>9}{'loads':>7}{'stores':>8}{'copy':>7}")
            for file, stream, row in rows(architecture, folder):
                kernel, registers, shared, spills, warps, *measured = row
                label = f"{file}: {kernel}"
                if spills:
                    wrong.append(f"sm_{architecture} {label}: {spills} bytes of registers are spilled")
                if stream and stream.stores and not measured[2]:
                    wrong.append(f"sm_{architecture} {label}: no store of 16 bytes on the way of most tokens")
                if not a.check:
                    line = f"{label:<56}{registers:>10}{shared:>8}{spills:>8}{warps:>7}"
                    if measured:
                        line += f"{measured[0]:>9.0f}{measured[1]:>7}{measured[2]:>8}{measured[3]:>7.0%}"
                    print(line, flush=True)
    if a.check:
        print("\n".join(wrong) or "no spills, and every stream stores 16 bytes at once")
        raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
