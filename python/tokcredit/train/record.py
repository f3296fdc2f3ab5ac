"""What a run leaves behind: metrics, TensorBoard, rollouts and the curve. A half-written file is never seen."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ROLLOUTS = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int64()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("reward", pa.float32()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("response_mask", pa.list_(pa.bool_())),
        *((name, pa.list_(pa.float32())) for name in ("rollout_log_probs", "old_log_probs", "log_probs")),
        ("entropies", pa.list_(pa.float32())),
        ("advantages", pa.list_(pa.float32())),
    ]
)


def write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def write_table(path: Path, table: pa.Table) -> None:
    """The whole table or none of it."""
    new = path.with_name(path.name + ".new")
    pq.write_table(table, new, compression="zstd")
    new.replace(path)


def write_figure(path: Path, figure: Any) -> None:
    """The whole picture or none of it."""
    new = path.with_name(path.name + ".new")
    figure.savefig(new, dpi=120, format="png")
    new.replace(path)


def claim(folder: Path, settings: Mapping[str, Any], resume: bool, free: Collection[str]) -> None:
    """Writes the settings into a new folder, or checks that what is resumed there has the same ones, except ``free``.

    Raises:
        ValueError: there are settings, and they are not resumed or differ.
    """
    path = folder / "settings.json"
    chosen = json.loads(json.dumps(settings, default=str))
    if path.exists():
        if not resume:
            raise ValueError(f"output: expected a folder without a run, or --resume, got {folder}")
        before = json.loads(path.read_text())
        for name, value in chosen.items():
            if name not in free and value != before.get(name):
                raise ValueError(f"{name}: expected {before.get(name)} as in the run to resume, got {value}")
    folder.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(chosen, indent=2) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's ``metrics.jsonl``, one per step; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Record:
    """Writes into a run's folder.

    Args:
        folder: of the run.
        first: metrics from this step on are dropped: they will be made again.
        header: about the run, kept in the metadata of the rollouts.
    """

    def __init__(self, folder: Path, first: int, header: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._schema = _ROLLOUTS.with_metadata({"tokcredit": json.dumps(header)})
        self.lines = [line for line in read_metrics(folder) if line["step"] < first]
        write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Adds a step's numbers."""
        self.lines.append(dict(line))
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name != "step" and math.isfinite(value):
                self._board.add_scalar(name, value, line["step"])
        self._board.flush()

    def rollouts(self, step: int, columns: Mapping[str, Sequence[Any] | None]) -> None:
        """Writes a step's rollouts, one per line of the table; a column of None is null."""
        rows = len(columns["reward"] or ())
        table = pa.table({k: [None] * rows if v is None else v for k, v in columns.items()}, schema=self._schema)
        write_table(self.folder / f"rollouts-{step:06}.parquet", table)

    def curve(self) -> None:
        """Draws reward and held-out accuracy over the steps into ``curve.png``."""
        draw_curves(self.folder / "curve.png", {"": [self.lines]})

    def close(self) -> None:
        self._board.close()


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average without the bias of its start."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + 1 - weight
        out.append(total / norm)
    return out


def draw_curves(path: Path, runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    """Training reward and held-out accuracy of named runs; several runs of a name become a mean and a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for color, (name, seeds) in enumerate(runs.items()):
        for axes, key, marker in ((left, "reward", ""), (right, "held_out", "o")):
            lines = [{m["step"]: m[key] for m in metrics if key in m} for metrics in seeds]
            steps = sorted(set.intersection(*map(set, lines))) if lines else []
            curves = [[line[s] for s in steps] for line in lines]
            if key == "reward":
                if len(curves) == 1:
                    axes.plot(steps, curves[0], color=f"C{color}", alpha=0.25, linewidth=1)
                curves = [smoothed(curve) for curve in curves]
            mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
            axes.plot(steps, mean, color=f"C{color}", marker=marker, markersize=3, label=name)
            if len(curves) > 1:
                low, high = ([f(column) for column in zip(*curves, strict=True)] for f in (min, max))
                axes.fill_between(steps, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
    left.set_title("reward of the rollouts, smoothed", fontsize=10)
    right.set_title("held-out accuracy, greedy", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if any(runs):
        right.legend(frameon=False)
    write_figure(path, figure)
