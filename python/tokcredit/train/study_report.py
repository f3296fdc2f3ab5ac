"""Tables and plots of a study, made from ``results.json`` alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap, sem, t

from tokcredit.files import whole, write

_VERDICTS = {1: "better", 0: "no difference shown", -1: "worse", None: "too few seeds"}
"""Verdicts by the sign of the interval of the difference."""
_ENOUGH = 5
"""Smallest number of seeds for a verdict."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval (percentile) of the mean of some numbers, or their one value twice.

    Args:
        values: Numbers of the seeds.
    """
    if len(set(values)) == 1:
        return values[0], values[0]
    found = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def interval_of_differences(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of some numbers by Student's t, or their one value twice.

    With few seeds it covers the mean of normally distributed numbers as often as it says, and a bootstrap interval does
    not.

    Args:
        values: Numbers of the seeds.
    """
    if len(set(values)) == 1:
        return values[0], values[0]
    low, high = t.interval(0.95, len(values) - 1, statistics.mean(values), sem(values))
    return float(low), float(high)


def tokens_to(runs: Sequence[Mapping[str, Any]], threshold: float) -> list[int]:
    """Return the tokens that runs had trained on when they first measured a threshold; runs that never do are left out.

    Args:
        runs: Runs of an arm.
        threshold: Held-out reward.
    """
    first = (
        next((n for n, reward in zip(run["tokens"], run["held_out"], strict=True) if reward >= threshold), None)
        for run in runs
    )
    return [n for n in first if n is not None]


def rows(results: Mapping[str, Any], experiment: str) -> list[tuple[str, ...]]:
    """Return the header and the rows of the table of an experiment.

    Args:
        results: Results of a study.
        experiment: Name of the experiment.
    """
    chosen = results["experiments"][experiment]
    arms = {name: results["arms"][arm["runs"]] for name, arm in chosen["arms"].items()}
    base = _finals(arms[chosen["baseline"]])
    header = (
        *("arm", "lr", "held-out reward", f"minus {chosen['baseline']}", "better seeds", "verdict"),
        *(f"tokens to {results['threshold']:g}", "branch tokens", _last_column(results)),
    )
    return [header, *(_row(name, arm, base, arm is arms[chosen["baseline"]], results) for name, arm in arms.items())]


def _row(
    name: str, arm: Mapping[str, Any], base: Sequence[float], is_base: bool, results: Mapping[str, Any]
) -> tuple[str, ...]:
    finals, runs = _finals(arm), arm["runs"]
    reached = tokens_to(runs, results["threshold"])
    tokens = f"{statistics.median(reached) / 1000:.0f}k ({len(reached)} of {len(runs)})" if reached else "not reached"
    compared = ("-", "-", "-")
    if not is_base:
        differences = [a - b for a, b in zip(finals, base, strict=True)]
        low, high = interval_of_differences(differences)
        better = sum(x > 0 for x in differences)
        sign = int(low > 0) - int(high < 0) if len(runs) >= _ENOUGH else None
        compared = (
            f"{statistics.mean(differences):+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{better} of {len(runs)}",
            _VERDICTS[sign],
        )
    return (
        f"`{name}`",
        f"{arm['lr']:g}",
        "{:.3f} [{:.3f}, {:.3f}]".format(statistics.mean(finals), *interval(finals)),
        *compared,
        tokens,
        f"{statistics.mean(run['branch_fraction'] for run in runs):.0%}",
        _signal(arm["gradient"]) if results["gradient_steps"] else _divergence(runs),
    )


def _last_column(results: Mapping[str, Any]) -> str:
    """Return what is reported of an arm at last: of its gradient, if that was measured, or of its sampler."""
    return "signal / noise" if results["gradient_steps"] else "sampler divergence"


def _finals(arm: Mapping[str, Any]) -> list[float]:
    return [run["held_out"][-1] for run in arm["runs"]]


def _signal(gradient: Mapping[str, float] | None) -> str:
    return "-" if gradient is None else f"{gradient['mean_squared_norm'] / gradient['variance']:.2f}"


def _divergence(runs: Sequence[Mapping[str, Any]]) -> str:
    return f"{statistics.mean(run['sampler_divergence'] for run in runs):.1e}"


def table(found: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    Args:
        found: Header and rows.
    """
    header, *rest = found
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rest))


def summary(found: Sequence[Sequence[str]], baseline: str) -> str:
    """Return the arms of a table by their verdict, as a sentence.

    Args:
        found: Header and rows of the table.
        baseline: Name of the baseline.
    """
    verdicts = found[0].index("verdict")
    groups = {verdict: [row[0] for row in found[1:] if row[verdicts] == verdict] for verdict in _VERDICTS.values()}
    parts = [f"{verdict}: {', '.join(arms)}" for verdict, arms in groups.items() if arms]
    return f"Compared with `{baseline}`: {'; '.join(parts)}." if parts else f"`{baseline}` alone."


def markdown(results: Mapping[str, Any], plots: str) -> str:
    """Return the size of a study, and for each experiment its question, verdicts, table, plot and options.

    Args:
        results: Results of a study.
        plots: Place of the plots, with ``{}`` for the name of the experiment.
    """
    seeds, rates = ", ".join(map(str, results["seeds"])), ", ".join(f"{lr:g}" for lr in results["lr"])
    tuning = len(results["tuning_seeds"])
    sections = [f"Seeds {seeds}; learning rates {rates}, tried on {tuning} other seed{'s' * (tuning > 1)}."]
    for name, experiment in results["experiments"].items():
        found = rows(results, name)
        arms = [(f"`{arm}`", f"`{given['options']}`") for arm, given in experiment["arms"].items()]
        sections += [
            f"### {experiment['question']}",
            summary(found, experiment["baseline"]),
            table(found),
            f"![{experiment['question']}]({plots.format(name)})",
            f"Options of all arms: `{results['options']} {experiment['options']}`",
            table([("arm", "further options"), *arms]),
        ]
    return "\n\n".join(sections)


def draw(results: Mapping[str, Any], experiment: str, path: Path) -> None:
    """Draw the held-out reward of each arm over the tokens: the mean over seeds, and the range between the seeds.

    Args:
        results: Results of a study.
        experiment: Name of the experiment.
        path: SVG file to write.
    """
    import matplotlib
    from matplotlib.figure import Figure

    grey = "#808080"  # read on white and on black
    style = {"svg.hashsalt": "tokcredit", "text.color": grey, "axes.labelcolor": grey, "axes.edgecolor": grey}
    with matplotlib.rc_context(style | {"xtick.color": grey, "ytick.color": grey}):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for color, (name, arm) in enumerate(results["experiments"][experiment]["arms"].items()):
            runs = results["arms"][arm["runs"]]["runs"]
            curves = np.array([run["held_out"] for run in runs])
            tokens = np.mean([run["tokens"] for run in runs], axis=0) / 1000
            axes.plot(tokens, curves.mean(0), color=f"C{color}", marker="o", markersize=3, label=name)
            axes.fill_between(tokens, curves.min(0), curves.max(0), color=f"C{color}", alpha=0.12, linewidth=0)
        axes.set_xlabel("thousand tokens")
        axes.set_ylabel("held-out reward")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        with whole(path) as new:
            figure.savefig(new, format="svg", transparent=True, metadata={"Date": None})


def write_report(folder: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``, ``report.md`` and a plot of each experiment.

    Args:
        folder: Folder of the study.
        results: Its results.

    Raises:
        WriteError: A file could not be written.
    """
    write(folder / "results.json", json.dumps(results, separators=(",", ":")) + "\n")
    write(folder / "report.md", markdown(results, "{}.svg") + "\n")
    for name in results["experiments"]:
        draw(results, name, folder / f"{name}.svg")
