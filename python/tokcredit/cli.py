"""The ``tokcredit`` command."""

from __future__ import annotations

import inspect
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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


def _plugins() -> dict[str, str]:
    """Return the names that are registered in verl, or why the plugin did not load, which verl does not show."""
    if _found("verl") == "not installed":
        return {}
    try:
        from tokcredit.adapters import verl
    except Exception as error:
        return {"verl plugins": f"failed to load: {error!r}"}
    return {f"verl {kind}": names for kind, names in verl.registered().items()}


def _print(lines: dict[str, str]) -> None:
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")


def info() -> None:
    """Print the version, the build, torch, the threads, the methods and the installed host trainers."""
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
            **_plugins(),
        }
    )


def methods() -> None:
    """Print every published method with one line about it."""
    _print({name: (inspect.getdoc(getattr(tc.methods, name)) or "").splitlines()[0] for name in tc.methods.names()})


def _train(settings: _Settings) -> None:
    """Train a language model with a token-credit method on tasks with verifiable answers."""
    train.run(settings)


def _compare(
    settings: _Settings,
    methods: tuple[str, ...] = ("grpo", "tempo", "ctpo"),
    seeds: int = 3,
) -> None:
    """Train several methods on the same prompts and plot them together.

    Args:
        settings: Settings of every run.
        methods: Names of methods.
        seeds: Number of runs per method.
    """
    train.compare(methods, settings, seeds)


def _inspect(
    path: tyro.conf.Positional[Path],
    method: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    tokenizer: str | None = None,
    step: int | None = None,
    prompt: int = 1,
    rewards: dict[str, float] | None = None,
) -> None:
    """Show the advantage of every token and where it comes from: one prompt in the terminal, or all in an HTML page.

    Args:
        path: Run folder, rollouts-*.parquet, TRL's completions_*.parquet, or .jsonl such as verl's.
        method: Method whose advantages are shown; may be repeated. The default is the method of the run, and grpo.
        output: HTML file to write.
        tokenizer: Folder or name of a tokenizer, for files with text and without token ids.
        step: Step to show; the default is the last.
        prompt: Number of the prompt to print, from 1.
        rewards: Columns whose weighted sum is the reward, as NAME WEIGHT NAME WEIGHT; for TRL with several reward
            functions.
    """
    from tokcredit.report import run

    written = run(path, method, output, tokenizer, step, prompt, rewards)
    if written is not None:
        _print({"report": str(written)})


def _analyze(settings: _Analysis) -> None:
    """Compare two models token by token on the responses of one of them."""
    analyze.run(settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: Arguments, or None for those of the command line.
    """
    commands: dict[str, Callable[..., Any]] = {
        "train": _train,
        "compare": _compare,
        "inspect": _inspect,
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
