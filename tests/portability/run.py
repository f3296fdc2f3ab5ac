"""``make test-aarch64``: the CPU operations for ARM give the bits that they give on this machine.

One program is compiled for x86-64 and for aarch64, and the second runs under qemu. It needs Debian's packages
g++-aarch64-linux-gnu and qemu-user.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), Path(__file__).with_name("sample.cpp")]
FLAGS = "-std=c++17 -O2 -Wall -Wextra -Werror -fno-math-errno -fno-trapping-math -ffp-contract=off -pthread"
FLAGS += " -DTOKCREDIT_LEVEL=base -Icsrc -Wno-psabi"


def built(compiler, folder):
    """The program, built by a compiler."""
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source):
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *FLAGS.split(), "-c", source, "-o", target], cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    subprocess.run([compiler, "-static", "-pthread", *objects, "-o", folder / "sample"], check=True)
    return folder / "sample"


def output(*command):
    """The lines that a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def main():
    if platform.machine() != "x86_64":
        raise SystemExit("expected an x86-64 machine, whose results are compared with those for ARM")
    here = output(built("g++", ROOT / "build/portability/x86_64"))
    arm = output("qemu-aarch64", built("aarch64-linux-gnu-g++", ROOT / "build/portability/aarch64"))
    differing = [(a, b) for a, b in zip(here, arm, strict=True) if a != b]
    for a, b in differing[:20]:
        print(f"x86-64:  {a}\naarch64: {b}")
    print(f"{len(here)} results of the CPU operations; {len(differing)} differ between x86-64 and aarch64")
    sys.exit(bool(differing) or len(here) < 1000)


if __name__ == "__main__":
    main()
