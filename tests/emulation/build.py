"""Builds the native module with its CUDA kernels on the host: ``python tests/emulation/build.py``.

Two flavours share the binding. ``plain`` is fast and sees what results show; ``instrumented`` checks every access to
memory. Objects are kept by a hash of what the compiler reads, so what has not changed is not compiled again.
"""

import argparse
import functools
import hashlib
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path("tests/emulation")
CACHE = ROOT / "build/emulation"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
COMMON = ["g++", "-std=c++17", "-fPIC", "-g1", "-fno-gnu-unique", f"-I{HERE}/include", "-Icsrc", *WARNINGS]
# In loops that it makes vector code of, g++ 12 sees overruns of arrays where there are none.
KERNEL = ["-O2", "-fno-strict-aliasing", "-Wno-array-bounds", "-x", "c++"]
KERNEL += ["-include", f"{HERE}/include/emulation/language.hpp"]
SANITIZERS = ["-fsanitize=thread,alignment,bounds,shift", "-fno-inline-small-functions"]
FLAVOURS = {"plain": [], "instrumented": ["-DEMULATION_INSTRUMENTED", *SANITIZERS]}


def binding_flags():
    import pybind11

    defines = ["-DTOKCREDIT_CUDA", "-DTOKCREDIT_EMULATED", '-DTOKCREDIT_CUDA_ARCHITECTURES="host"']
    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    return ["-O1", "-fvisibility=hidden", *defines, '-DTOKCREDIT_COMPILER="g++"', *includes]


def compile_one(root, source, flags):
    """The object of a source below ``root``."""
    command = [*COMMON, *flags]
    read = subprocess.run([*command, "-E", "-fno-working-directory", source], cwd=root, capture_output=True)
    if read.returncode:
        raise SystemExit(read.stderr.decode())
    key = hashlib.sha256(read.stdout + repr(command).encode()).hexdigest()[:24]
    out = CACHE / "objects" / f"{Path(source).stem}-{key}.o"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-c", source, "-o", str(part)], cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        part.rename(out)
    return str(out)


def objects(root, jobs):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: compile_one(root, *job), jobs))


def link(target, parts):
    """Links what has changed; a process that runs the old file keeps it."""
    stamp, key = target.with_suffix(".key"), repr(parts)
    if target.exists() and stamp.exists() and stamp.read_text() == key:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    subprocess.run(["g++", "-shared", "-o", str(target), *parts, "-lpthread", "-ldl"], check=True)
    stamp.write_text(key)


def kernel_objects(flavour, root, sources):
    """The objects of kernels below ``root``, which may be a changed copy of the tree."""
    extra = [] if root == ROOT else ["-Wno-error"]
    return objects(
        root, [(str(Path("csrc/cuda", source)), [*KERNEL, *FLAVOURS[flavour], *extra]) for source in sources]
    )


@functools.cache
def emulator_and_kernels(flavour):
    kernels = sorted(p.name for p in (ROOT / "csrc/cuda").glob("*.cu") if p.stem != "launch")
    flags = ["-O2", *(flag for flag in FLAVOURS[flavour] if flag.startswith("-D"))]
    emulator = [(str(HERE / source), flags) for source in ("schedule.cpp", "collectives.cpp", "memory.cpp")]
    return [*kernel_objects(flavour, ROOT, kernels), *objects(ROOT, emulator)]


def build_library(flavour, folder, changed=()):
    """The library with the emulator and the kernels; ``changed`` are objects of kernels to take instead.

    A kernel that is in two objects is taken from the first.
    """
    names = {Path(part).name.rpartition("-")[0] for part in changed}
    others = [part for part in emulator_and_kernels(flavour) if Path(part).name.rpartition("-")[0] not in names]
    library = folder / f"libkernels_{flavour}.so"
    link(library, [*changed, *others, f"-Wl,-soname,{library.name}"])
    return library


def build(flavour):
    """Path of the module of a flavour."""
    folder = CACHE / flavour
    library = build_library(flavour, folder)
    bind = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/bind").glob("*.cpp"))
    # What runs on the host only.
    host = [(f"csrc/cpu/{name}.cpp", ["-O1"]) for name in ("memory", "tree_pack")]
    jobs = [(source, binding_flags()) for source in bind] + host
    module = folder / "_C.so"
    # By name beside the module, so that a copy of it takes the library beside the copy.
    link(module, ["-Wl,-rpath,$ORIGIN", *objects(ROOT, jobs), str(library)])
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("flavours", nargs="*", default=list(FLAVOURS))
    for name in parser.parse_args().flavours:
        print(build(name), file=sys.stderr)
