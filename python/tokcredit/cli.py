"""The ``tokcredit`` command."""

from __future__ import annotations

import argparse
import inspect
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any


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


def see(path: str, method: list[str] | None, output: str | None, **settings: Any) -> dict[str, str]:
    """Where the report went, or nothing after printing one prompt."""
    import tokcredit.inspect

    written = tokcredit.inspect.run(path, method, output, **settings)
    return {} if written is None else {"report": str(written)}


def main(arguments: list[str] | None = None) -> None:
    """Runs one of the commands on ``arguments``, the command line by default."""
    parser = argparse.ArgumentParser(prog="tokcredit", description="Token-level credit assignment.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, build, torch, threads, methods, host trainers").set_defaults(run=info)
    commands.add_parser("methods", help="every published method, in a line").set_defaults(run=methods)
    page = commands.add_parser("inspect", help="which tokens were paid: one prompt here, or a page with -o")
    page.add_argument("path", help="run folder, rollouts-*.parquet, completions_*.parquet or .jsonl")
    page.add_argument("--method", action="append", help="may be repeated; the run's own and grpo by default")
    page.add_argument("-o", "--output", help="HTML file to write")
    page.add_argument("--tokenizer", help="folder or name, for files that hold text and no token ids")
    page.add_argument("--step", type=int, help="the last by default")
    page.add_argument("--prompt", type=int, default=1, help="which one to print, from 1")
    page.set_defaults(run=see)
    chosen = vars(parser.parse_args(arguments))
    run = chosen.pop("run")
    del chosen["command"]
    lines = run(**chosen)
    width = max(map(len, lines), default=0)
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
