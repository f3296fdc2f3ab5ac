"""The ``tokcredit`` command."""

from __future__ import annotations

import inspect
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import tyro

import tokcredit as tc
from tokcredit import analyze, train
from tokcredit.analyze import Divergent, Shift
from tokcredit.train import Settings

_Settings = Annotated[Settings, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
_Analysis = Annotated[
    Annotated[Shift, tyro.conf.subcommand("shift")] | Annotated[Divergent, tyro.conf.subcommand("divergent")],
    tyro.conf.arg(name=""),
    tyro.conf.OmitArgPrefixes,
]


def _found(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _print(lines: dict[str, str]) -> None:
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")


def info() -> None:
    """Version, build, torch, threads, methods and host trainers."""
    build = tc.build_info()
    cuda = f"yes, for {build['cuda_architectures']}" if build["cuda"] else "no (CPU only)"
    _print(
        {
            "tokcredit": tc.__version__,
            "built with CUDA": cuda,
            "compiler": build["compiler"],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": str(tc.num_threads()),
            "methods": ", ".join(tc.methods.names()),
            **{host: _found(host) for host in ("trl", "verl", "vllm")},
        }
    )


def methods() -> None:
    """Every published method, in a line each."""
    _print({name: (inspect.getdoc(getattr(tc.methods, name)) or "").splitlines()[0] for name in tc.methods.names()})


def _train(settings: _Settings) -> None:
    """Train a language model with a token-credit method on verifiable tasks."""
    train.run(settings)


def _compare(
    settings: _Settings,
    methods: tuple[str, ...] = ("grpo", "tempo", "ctpo"),
    seeds: int = 3,
) -> None:
    """Train several methods on the same prompts and plot them together.

    Args:
        settings: of every run.
        methods: names of methods.
        seeds: runs per method.
    """
    train.compare(methods, settings, seeds)


def _analyze(settings: _Analysis) -> None:
    """Compare two models token by token, along what one of them writes."""
    analyze.run(settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one of the commands on ``arguments``, the command line by default."""
    commands: dict[str, Callable[..., Any]] = {
        "train": _train,
        "compare": _compare,
        "analyze": _analyze,
        "info": info,
        "methods": methods,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="tokcredit", description=tc.__doc__, args=None if arguments is None else list(arguments)
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        sys.exit(f"tokcredit: {error}")
