"""Several methods on the same prompts, each with several seeds: one plot and one table."""

from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokcredit.files import WriteError, write
from tokcredit.train.compatibility import only_read
from tokcredit.train.curve import Curve, curve_of
from tokcredit.train.experiment import NEUTRAL, check_folder, checked, read_summary, resolved, run
from tokcredit.train.folder import locked
from tokcredit.train.ranks import check_launch, on_main, processes
from tokcredit.train.record import draw_curves, read_metrics
from tokcredit.train.settings import Settings


def compare(methods: tuple[str, ...], settings: Settings, seeds: int = 3) -> Path | None:
    """Train each method with each seed and write ``compare.png`` and ``compare.md``.

    Runs with the same seed start from one model and see the same prompts in the same order. Finished runs are not
    repeated, and an interrupted one is resumed, so a further method or seed runs only what is missing. All runs in a
    folder have the same settings.

    Args:
        methods: Names of methods.
        settings: Settings of every run, in which the method, the seed and the folder are replaced.
        seeds: Number of runs per method, with seeds from ``settings.seed`` on.

    Returns:
        The folder, or None if the comparison was stopped before its end.

    Raises:
        ValueError: There is no method or no seed, a setting is wrong, or the folder has runs with other settings.
        WriteError: The folder cannot be written, for example because the disk is full.
    """
    check_launch()
    if not methods or seeds < 1:
        raise ValueError(f"methods, seeds: expected at least one of each, got {list(methods)}, {seeds}")
    folder = settings.output or Path("runs/compare")
    numbers = range(settings.seed, settings.seed + seeds)
    with locked(folder):
        runs = [_one(settings, method, seed, folder) for seed in numbers for method in methods]
        for one in runs:
            on_main(partial(check_folder, one, NEUTRAL))
        missing = [one for one in runs if read_summary(one.output or folder) is None]
        # What is wrong with one method is an error before the first run, not after it.
        for one in {one.objective.method: one for one in missing}.values():
            checked(one)
        for one in missing:
            if run(one) is None:
                return None
        if processes().is_main_process:
            try:
                _report(folder, methods, numbers, curve_of(settings))
            except WriteError as error:
                raise WriteError(f"{error}; the runs are kept, and the same command shows them") from error
    return folder


def _one(settings: Settings, method: str, seed: int, folder: Path) -> Settings:
    objective = dataclasses.replace(settings.objective, method=method)
    output = folder / f"{method}-seed{seed}"
    one = dataclasses.replace(settings, objective=objective, seed=seed, output=output, resume=True)
    # The methods that read no other models have none.
    return resolved(only_read(one, objective.build()))


def _report(folder: Path, methods: tuple[str, ...], seeds: range, curve: Curve) -> None:
    runs = {m: [folder / f"{m}-seed{seed}" for seed in seeds] for m in methods}
    draw_curves(folder / "compare.png", {m: [read_metrics(f) for f in folders] for m, folders in runs.items()}, curve)
    title = f"{curve.titles[1]}, {len(seeds)} seeds, mean ± deviation"
    table = Table("method", "before", "after", "best", "seconds", title=title)
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
