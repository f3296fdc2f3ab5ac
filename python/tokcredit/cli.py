"""The ``tokcredit`` command."""

from __future__ import annotations

import argparse
import inspect
import platform
from importlib.metadata import PackageNotFoundError, version


def _found(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def info() -> dict[str, str]:
    """Version, build, torch, threads, methods and host trainers, by name."""
    import torch

    import tokcredit as tc

    build = tc.build_info()
    cuda = f"yes, for {build['cuda_architectures']}" if build["cuda"] else "no (CPU only)"
    return {
        "tokcredit": tc.__version__,
        "built with CUDA": cuda,
        "compiler": build["compiler"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(tc.num_threads()),
        "methods": ", ".join(tc.methods.names()),
        **{host: _found(host) for host in ("trl", "verl", "vllm")},
    }


def methods() -> dict[str, str]:
    """First line of each method's description, by name."""
    import tokcredit as tc

    return {name: (inspect.getdoc(getattr(tc.methods, name)) or "").splitlines()[0] for name in tc.methods.names()}


def main(arguments: list[str] | None = None) -> None:
    """Runs one of the commands on ``arguments``, the command line by default."""
    parser = argparse.ArgumentParser(prog="tokcredit", description="Token-level credit assignment.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, build, torch, threads, methods, host trainers").set_defaults(run=info)
    commands.add_parser("methods", help="every published method, in a line").set_defaults(run=methods)
    lines = parser.parse_args(arguments).run()
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
