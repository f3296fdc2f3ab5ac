"""Reports on a run: the advantage of every token and where it comes from, as an HTML page or in the terminal.

``read`` takes the files that trainers write. ``compute`` makes plain tables of them with the library's own trees,
stages and losses. The page and the terminal show those tables. Needs ``pip install "tokcredit[report]"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokcredit.files import write
from tokcredit.methods import load, names
from tokcredit.preference import Preference
from tokcredit.report import attributions
from tokcredit.report.data import Data, compute
from tokcredit.report.readers import Run, read
from tokcredit.report.recorded import as_recorded

__all__ = ["Data", "Run", "compute", "read", "report", "run"]


def run(
    path: str | Path,
    methods: Sequence[str] | None = None,
    output: str | Path | None = None,
    tokenizer: str | None = None,
    step: int | None = None,
    prompt: int = 1,
    rewards: Mapping[str, float] | None = None,
) -> Path | None:
    """Write the report to ``output`` and return its path, or print one prompt if there is no ``output``.

    Args:
        path: File or run folder; see :func:`read`. The scores that ``tokcredit analyze attribute`` writes need an
            ``output``, and take no other argument.
        methods: Names of methods; by default the one the run was trained with, and GRPO to compare. By default pairs
            are shown under DPO, or under SimPO if the file has no log-probs of a reference policy.
        output: HTML file, or None for the terminal.
        tokenizer: Folder or name of a tokenizer, for files that hold text and no token ids.
        step: Training step, the last by default.
        prompt: Prompt that the terminal shows, from 1.
        rewards: Weights of the columns whose sum is the reward; see :func:`read`.

    Raises:
        ModuleNotFoundError: A package of the extra ``report`` is missing.
        ValueError: The file cannot be read, lacks an input that a method reads, or has no such prompt.
    """
    try:
        if (scores := attributions.read(Path(path))) is not None:
            given = {"methods": methods or None, "tokenizer": tokenizer, "step": step, "rewards": rewards}
            return _write_scores(scores, Path(path), output, given)
        found = read(path, tokenizer, step, rewards)
        data = compute(found, list(methods)) if methods else _usual(found)
        if output is not None:
            return _write(data, Path(output))
        from tokcredit.report.terminal import show

        show(data, prompt)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name}: expected to be installed for reports; pip install 'tokcredit[report]'"
        ) from error
    return None


def report(folder: str | Path, method: Any = None) -> Path:
    """Write ``report.html`` into a run folder, on its last step, and return its path.

    GRPO is shown beside the run's own method, except beside a preference method. Where the file does not hold the
    inputs that the method reads, the page shows the advantages that the trainer wrote.

    Args:
        folder: Run folder with ``rollouts-*.parquet`` and ``tokenizer``.
        method: What the run was trained with: an objective, which is shown under the name in the file, or the name of a
            method; by default the name in the file.

    Raises:
        ValueError: The folder has no rollouts, or they cannot be read.
    """
    return _write(_usual(read(folder), method), Path(folder) / "report.html")


def _usual(found: Run, method: Any = None) -> Data:
    """Return the tables of a run under its own method, as far as the file has its inputs, and under GRPO."""
    written = found.settings.get("method")
    if method is None or isinstance(method, str):
        name = method or (written if written in names() else _default(found))
        objective = load(name)
    else:
        name, objective = written or "trained", method
    objective, notes = as_recorded(name, objective, found)
    alone = name == "grpo" or isinstance(objective, Preference)
    data = compute(found, {name: objective} if alone else {name: objective, "grpo": load("grpo")})
    return replace(data, notes=notes + data.notes)


def _default(found: Run) -> str:
    """Return the method of a run that does not say by which it was trained."""
    if not found.of_pairs:
        return "grpo"
    return "dpo" if found.batch.ref_log_probs is not None else "simpo"


def _write_scores(scores: list[Any], path: Path, output: str | Path | None, given: Mapping[str, Any]) -> Path:
    """Write the page of a file of attributions, which takes none of the given arguments."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected none because {path} holds scores of an attribution, got {value}")
    if output is None:
        raise ValueError(f"output: expected an HTML file because {path} holds scores of an attribution, got None")
    write(Path(output), attributions.render(scores, path.name))
    return Path(output)


def _write(data: Data, path: Path) -> Path:
    from tokcredit.report.page import render

    write(path, render(data))
    return path
