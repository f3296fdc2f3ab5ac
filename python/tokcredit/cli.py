"""The ``tokcredit`` command."""

from __future__ import annotations

import functools
import inspect
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar, Union

import torch
import tyro

import tokcredit as tc
from tokcredit import analyze, exits, kernels, options, pairs, train
from tokcredit.analyze import Attribute, CompressSettings, Divergent, Shift
from tokcredit.pairs import PairsSettings
from tokcredit.settings import Declared, option, whole_number
from tokcredit.train import ComparisonSettings, MergeSettings, Settings, StudySettings


@dataclass(frozen=True)
class InspectSettings(Declared):
    """What a report shows."""

    path: tyro.conf.Positional[Path]
    """Run folder, rollouts-*.parquet, TRL's completions_*.parquet, or .jsonl such as verl's."""
    method: tyro.conf.UseAppendAction[tuple[str, ...]] = option((), *tc.methods.names(), several=True)
    """Method to show; may be repeated. The default is that of the run, and grpo beside a method without pairs."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """HTML file to write."""
    tokenizer: str | None = None
    """Folder or name of a tokenizer, for files with text and without token ids."""
    step: int | None = whole_number(None, at_least=0, optional=True)
    """Step to show; the default is the last."""
    prompt: int = whole_number(1, at_least=1)
    """Number of the prompt to print, from 1."""
    rewards: dict[str, float] | None = None
    """Columns whose weighted sum is the reward, as NAME WEIGHT NAME WEIGHT; for TRL with several reward functions."""


T = TypeVar("T")
_Flat: TypeAlias = Annotated[T, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
_Analysis: TypeAlias = _Flat[
    Annotated[Shift, tyro.conf.subcommand("shift")]
    | Annotated[Divergent, tyro.conf.subcommand("divergent")]
    | Annotated[Attribute, tyro.conf.subcommand("attribute")]
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
    """Print the version, the kernels in use, torch, the threads, the methods and the installed host trainers."""
    _print(
        {
            "tokcredit": tc.__version__,
            "compiler": tc.build_info()["compiler"],
            "CPU kernels": kernels.cpu(),
            "CUDA kernels": kernels.cuda(),
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


def _train(settings: _Flat[Settings]) -> bool:
    """Train a language model with a token-credit method on tasks with verifiable answers."""
    return train.run(settings) is None


def _compare(settings: _Flat[Settings], comparison: _Flat[ComparisonSettings]) -> bool:
    """Train several methods on the same prompts and plot them together."""
    if (method := settings.objective.method) != type(settings.objective)().method:
        raise ValueError(f"method: expected --methods and the names of all methods to compare, got --method {method}")
    return train.compare(comparison.methods, settings, comparison.seeds) is None


def _study(settings: _Flat[StudySettings]) -> bool:
    """Run a study: sets of options, each with a tuned learning rate and several seeds, compared with a baseline."""
    return train.study(settings) is None


def _inspect(settings: _Flat[InspectSettings]) -> None:
    """Show the advantage of every token and where it comes from: one prompt in the terminal, or all in an HTML page."""
    from tokcredit.report import run

    s = settings
    written = run(s.path, s.method, s.output, s.tokenizer, s.step, s.prompt, s.rewards)
    if written is not None:
        _print({"report": str(written)})


def _merge(settings: _Flat[MergeSettings]) -> None:
    """Merge the adapter of a run into its model."""
    train.merge(settings)
    _print({"model": str(settings.output)})


def _pairs(settings: _Flat[PairsSettings]) -> None:
    """Make pairs of a chosen and a rejected response from the rollouts of a run."""
    counts = pairs.run(settings)
    _print({"file": str(settings.output), **{name.replace("_", " "): str(n) for name, n in counts.items()}})


def _analyze(settings: _Analysis) -> None:
    """Compare two models token by token on the responses of one of them, or show which tokens of a prompt mattered."""
    analyze.run(settings)


def _compress(settings: _Flat[CompressSettings]) -> None:
    """Shorten prompts to the words that mattered, in their order."""
    counts = analyze.compress(settings)
    _print({"file": str(settings.output), **{name.replace("_", " "): str(n) for name, n in counts.items()}})


_COMMANDS: dict[str, Callable[..., bool | None]] = {
    "analyze": _analyze,
    "compare": _compare,
    "compress": _compress,
    "info": info,
    "inspect": _inspect,
    "merge": _merge,
    "methods": methods,
    "pairs": _pairs,
    "study": _study,
    "train": _train,
}
"""The commands by name; each returns whether it was stopped before its end."""


def _later(command: Callable[..., T]) -> Callable[..., functools.partial[T]]:
    """Return a function that only keeps the settings, so that errors of the command are not those of parsing."""

    @functools.wraps(command)
    def chosen(*positional: Any, **named: Any) -> functools.partial[T]:
        return functools.partial(command, *positional, **named)

    return chosen


if TYPE_CHECKING:
    _Command = Any
else:
    _each = tuple(Annotated[Any, tyro.conf.subcommand(x, constructor=_later(f))] for x, f in _COMMANDS.items())
    _Command = Annotated[Union[_each], tyro.conf.arg(name="")]  # noqa: UP007


def _parsed(command: _Command, debug: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False) -> tuple[Any, bool]:
    """Return the chosen command and whether tracebacks are wanted.

    Args:
        command: The command.
        debug: Show the traceback of every error.
    """
    return command, debug


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    A known error ends it with one line, any other with its traceback. A signal that stops it before its end gives the
    exit code 128 + n: 130 for SIGINT, 143 for SIGTERM.

    Args:
        arguments: Arguments, or None for those of the command line.
    """
    typed = sys.argv[1:] if arguments is None else list(arguments)
    if os.getcwd() not in map(os.path.abspath, sys.path):
        sys.path.append(os.getcwd())  # so that modules of the user are found as with python -m
    try:
        command, debug = tyro.cli(
            _parsed,
            prog="tokcredit",
            description=tc.__doc__,
            args=typed,
            config=(tyro.conf.CascadeSubcommandArgs,),
            registry=options.registry,
        )
    except options.RejectedError as error:
        if "--debug" in typed:
            raise
        sys.exit(f"tokcredit: {options.named(str(error), [error.settings], typed)}")
    except SystemExit as error:
        chosen = next((x for x in typed if x in _COMMANDS), None)
        if error.code and chosen is not None:
            for sentence in options.meant(typed, _COMMANDS[chosen]):
                print(f"tokcredit: {sentence}", file=sys.stderr)
        raise
    with exits.signals() as first:
        try:
            stopped_by = first(signal.SIGTERM) if command() else None
        except KeyboardInterrupt:
            if debug:
                traceback.print_exc()
            stopped_by = first(signal.SIGINT)
        except Exception as error:
            if debug or not exits.is_known(error, typed):
                raise
            settings = map(type, (*command.args, *command.keywords.values()))
            sys.exit(f"tokcredit: {options.named(str(error), settings, typed)}")
    if stopped_by is not None:
        print(f"tokcredit: stopped by {stopped_by.name}", file=sys.stderr)
        sys.exit(128 + stopped_by)
