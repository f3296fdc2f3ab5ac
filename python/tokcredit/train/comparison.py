"""Several methods on the same prompts, each over several seeds: one plot, one table."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from tokcredit.train.experiment import read_summary, run
from tokcredit.train.record import draw_curves, read_metrics, write
from tokcredit.train.settings import Settings


def compare(methods: tuple[str, ...], settings: Settings, seeds: int = 3) -> Path | None:
    """Trains each method with each seed and writes ``compare.png`` and ``compare.md``; finished runs are not repeated.

    Runs of a seed start from one model and see the same prompts in the same order. A run that was interrupted is
    resumed.

    Args:
        methods: names of methods.
        settings: of every run; the method, the seed and the folder of each are put in.
        seeds: runs per method, from ``settings.seed`` on.

    Returns:
        The folder; None when stopped before the end.
    """
    if not methods or seeds < 1:
        raise ValueError(f"methods, seeds: expected at least one of each, got {list(methods)}, {seeds}")
    objectives = {m: dataclasses.replace(settings.objective, method=m) for m in methods}
    for objective in objectives.values():
        objective.build()  # A wrong name or setting is an error before the first run, not after it.
    folder = settings.output or Path("runs/compare")
    numbers = range(settings.seed, settings.seed + seeds)
    for seed in numbers:
        for method in methods:
            output = folder / f"{method}-seed{seed}"
            if read_summary(output):
                continue
            one = dataclasses.replace(settings, objective=objectives[method], seed=seed, output=output, resume=True)
            if run(one) is None:
                return None
    if PartialState().is_main_process:
        _report(folder, methods, numbers)
    return folder


def _report(folder: Path, methods: tuple[str, ...], seeds: range) -> None:
    runs = {m: [folder / f"{m}-seed{seed}" for seed in seeds] for m in methods}
    draw_curves(folder / "compare.png", {m: [read_metrics(f) for f in folders] for m, folders in runs.items()})
    table = Table(
        "method", "before", "after", "best", "seconds", title=f"held-out accuracy, {len(seeds)} seeds, mean ± spread"
    )
    lines = ["| method | before | after | best | seconds |", "| --- | --- | --- | --- | --- |"]
    for method, folders in runs.items():
        summaries = [read_summary(f) or {} for f in folders]
        cells = [
            _spread([s[key] for s in summaries], digits)
            for key, digits in (("held_out_before", 3), ("held_out_after", 3), ("held_out_best", 3), ("seconds", 0))
        ]
        table.add_row(method, *cells)
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    write(folder / "compare.md", "\n".join(lines) + "\n")
    Console().print(table)
    Console().print(f"{folder / 'compare.png'}", highlight=False)


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
