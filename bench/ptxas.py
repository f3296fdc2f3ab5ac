"""Registers, shared memory and spills of every kernel, as the compiler reports them.

Run: ``python bench/ptxas.py [--architectures 90] > bench/ptxas.txt``; needs nvcc, no GPU. Kernels of CUB are left out.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-Xcompiler=-Wall,-fPIC"]


def report(source, architecture, folder):
    command = ["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-c", str(source), "-o", f"{folder}/{source.stem}.o"]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    text = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    kernel, spills = None, ""
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(.*)' for", line):
            kernel = re.sub(r"tokcredit::|cuda::|\(anonymous namespace\)::|^void ", "", found[1])
            kernel = re.sub(r"\((Surrogate|Reduction)\)", "", kernel).split("(")[0]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = f"{found[1]}/{found[2]}"
        elif (found := re.search(r"Used (\d+) registers", line)) and kernel and not kernel.startswith("cub::"):
            shared = re.search(r"(\d+) bytes smem", line)
            yield kernel, found[1], shared[1] if shared else "0", spills


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--architectures", nargs="+", default=["90"])
    a = parser.parse_args()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    print(f"nvcc {re.search(r'V([0-9.]+)', version)[1]}; spills are bytes stored/loaded per thread")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in a.architectures:
            print(f"\n{'sm_' + architecture:<64}{'registers':>10}{'shared':>8}{'spills':>10}")
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                for kernel, registers, shared, spills in sorted(report(source, architecture, folder)):
                    print(f"{kernel:<64}{registers:>10}{shared:>8}{spills:>10}", flush=True)


if __name__ == "__main__":
    main()
