"""The files of a run: metrics, TensorBoard, rollouts and the curve. Other files than logs are whole or absent."""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tokcredit.files import naming, parsed, whole, write
from tokcredit.train.curve import Curve

OF_TURNS = ("turn_ids", "anchor_ids", "token_rewards", "turn_rewards", "turn_scores")
"""Inputs that tell the turns of an episode and their rewards, which are recorded where rollouts have them."""

_ROLLOUTS = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int64()),
        ("task", pa.string()),
        ("world", pa.string()),
        ("trajectory", pa.int64()),
        ("context_keys", pa.int64()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("reward", pa.float32()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("response_mask", pa.list_(pa.bool_())),
        *(
            (name, pa.list_(pa.float32()))
            for name in ("rollout_log_probs", "old_log_probs", "ref_log_probs", "log_probs")
        ),
        ("entropies", pa.list_(pa.float32())),
        ("prompt_pairs", pa.bool_()),
        ("advantages", pa.list_(pa.float32())),
        *((name, pa.list_(pa.int64() if name.endswith("_ids") else pa.float32())) for name in OF_TURNS),
        *((name, pa.list_(pa.string())) for name in ("answers", "states")),
    ]
)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, whole or not at all.

    Args:
        path: The file.
        table: Its table.
    """
    with whole(path) as new:
        pq.write_table(table, new, compression="zstd")


def write_figure(path: Path, figure: Any) -> None:
    """Write a PNG file, whole or not at all.

    Args:
        path: The file.
        figure: A matplotlib figure.
    """
    with whole(path) as new:
        figure.savefig(new, dpi=120, format="png")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``, one per step, without a last line that is incomplete.

    Args:
        folder: Folder of the run.
    """
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [parsed(line, f"{path}:{number}", "output") for number, line in enumerate(text.split("\n")[:-1], 1)]


class Record:
    """Writes the files of a run.

    Args:
        folder: Folder of the run.
        first: Number of the first step to come; metrics from this step on are dropped, because they will be made again.
        header: Facts about the run, kept in the metadata of the rollouts.

    Attributes:
        folder: Folder of the run.
        lines: Metrics of the steps so far.
    """

    def __init__(self, folder: Path, first: int, header: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._schema = _ROLLOUTS.with_metadata({"tokcredit": json.dumps(header)})
        self.lines = [line for line in read_metrics(folder) if line["step"] < first]
        write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        _quiet_threads()
        with naming(folder / "tensorboard"):
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Add the metrics of a step. Numbers that are not finite are left out.

        Args:
            line: Numbers by name, with the number of the step under ``step``.
        """
        finite = {name: value for name, value in line.items() if math.isfinite(value)}
        self.lines.append(finite)
        path = self.folder / "metrics.jsonl"
        with naming(path), path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        with naming(self.folder / "tensorboard"):
            for name, value in finite.items():
                if name != "step":
                    self._board.add_scalar(name, value, line["step"])
            self._board.flush()

    def rollouts(self, step: int, columns: Mapping[str, Sequence[Any] | None]) -> None:
        """Write the rollouts of a step as a table.

        Args:
            step: Number of the step.
            columns: For each column a value per row, or None for a column of nulls. So is a column that is not there.
        """
        nulls = [None] * len(columns["reward"] or ())
        given = {name: nulls if column is None else column for name, column in columns.items()}
        table = pa.table({name: nulls for name in self._schema.names} | given, schema=self._schema)
        write_table(self.folder / f"rollouts-{step:06}.parquet", table)

    def curve(self, shown: Curve) -> None:
        """Draw the learning curve into ``curve.png``.

        Args:
            shown: What it shows.
        """
        draw_curves(self.folder / "curve.png", {"": [self.lines]}, shown)

    def close(self) -> None:
        """Close the TensorBoard file."""
        with naming(self.folder / "tensorboard"):
            self._board.close()


@functools.cache
def _quiet_threads() -> None:
    """Print no traceback of TensorBoard's thread that writes: ``flush`` raises its error here."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            before(arguments)

    threading.excepthook = hook


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Return the exponential moving average, without the bias of its start.

    Args:
        values: Numbers in order.
        weight: Weight of the average before each number, at least 0 and below 1.
    """
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + 1 - weight
        out.append(total / norm)
    return out


def draw_curves(path: Path, runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], shown: Curve) -> None:
    """Draw a metric of training, smoothed, and a held-out metric of runs.

    Args:
        path: PNG file to write.
        runs: For each name the metrics of one run, or of several, which become a mean and a band.
        shown: What the curves show.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=shown.together)
    for color, (name, seeds) in enumerate(runs.items()):
        for axes, key, marker in ((left, shown.training, ""), (right, shown.held_out, "o")):
            lines = [{m["step"]: m[key] for m in metrics if key in m} for metrics in seeds]
            steps = sorted(set.intersection(*map(set, lines))) if lines else []
            curves = [[line[s] for s in steps] for line in lines]
            if axes is left:
                if len(curves) == 1:
                    axes.plot(steps, curves[0], color=f"C{color}", alpha=0.25, linewidth=1)
                curves = [smoothed(curve) for curve in curves]
            mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
            axes.plot(steps, mean, color=f"C{color}", marker=marker, markersize=3, label=name)
            if len(curves) > 1:
                low, high = ([f(column) for column in zip(*curves, strict=True)] for f in (min, max))
                axes.fill_between(steps, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
    left.set_title(f"{shown.titles[0]}, smoothed", fontsize=10)
    right.set_title(shown.titles[1], fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if any(runs):
        right.legend(frameon=False)
    write_figure(path, figure)
