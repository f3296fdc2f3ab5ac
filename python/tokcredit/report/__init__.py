"""See the credit: which tokens of a run were paid, and why, as one HTML file or in the terminal.

``read`` takes what trainers leave on disk, ``compute`` makes plain tables of it with the library's own trees, credits,
ratios and windows, and the page and the terminal show those tables. Needs ``pip install 'tokcredit[inspect]'``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokcredit.report.data import Data, compute
from tokcredit.report.readers import Run, read
from tokcredit.report.recorded import as_recorded
from tokcredit.methods import load, names
from tokcredit.objective import Objective

__all__ = ["Data", "Run", "compute", "read", "report", "run"]


def run(
    path: str | Path,
    methods: tuple[str, ...] | list[str] | None = None,
    output: str | Path | None = None,
    tokenizer: str | None = None,
    step: int | None = None,
    prompt: int = 1,
) -> Path | None:
    """Writes the report to ``output`` and returns its path; without one, prints a prompt to the terminal.

    Args:
        path: file or run folder, see :func:`read`.
        methods: names; by default the one the run was trained with, and GRPO to compare.
        output: an HTML file.
        tokenizer: folder or name, for text without token ids.
        step: which step, the last by default.
        prompt: which one the terminal shows, counted from 1.
    """
    try:
        found = read(path, tokenizer, step)
        data = compute(found, list(methods)) if methods else _usual(found)
        if output is not None:
            return _write(data, Path(output))
        from tokcredit.report.terminal import show

        show(data, prompt)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name}: expected for inspect: pip install 'tokcredit[inspect]'") from error
    return None


def report(folder: str | Path, method: str | Objective | None = None) -> Path:
    """Writes ``report.html`` into a run folder, over its last step, and returns its path.

    Args:
        folder: a run folder with ``rollouts-*.parquet`` and ``tokenizer``.
        method: what it was trained with, by name or as an objective, which is shown under the name in the file. Where
            the file does not hold what it needs, the trainer's own advantages are shown. GRPO stands beside it.
    """
    return _write(_usual(read(folder), method), Path(folder) / "report.html")


def _usual(found: Run, method: str | Objective | None = None) -> Data:
    """The run under its own method, as far as the file holds what that needs, and under GRPO."""
    written = found.settings.get("method")
    if isinstance(method, Objective):
        name, objective = written or "trained", method
    else:
        name = method or (written if written in names() else "grpo")
        objective = load(name)
    objective, notes = as_recorded(name, objective, found)
    data = compute(found, {name: objective} if name == "grpo" else {name: objective, "grpo": load("grpo")})
    return replace(data, notes=notes + data.notes)


def _write(data: Data, path: Path) -> Path:
    from tokcredit.report.page import render

    path.write_text(render(data), encoding="utf-8", errors="replace")
    return path
