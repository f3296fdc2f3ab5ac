"""``tokcredit analyze shift``: where a tuned model differs from its base, and what that gains (arXiv 2603.22446)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.table import Table

from tokcredit.analyze.crossing import Crossed, Rule, cross
from tokcredit.analyze.settings import Shift
from tokcredit.analyze.study import load_pair, opened, report, resolved
from tokcredit.train.judging import Judging
from tokcredit.train.problems import Problem
from tokcredit.train.prompts import Prompts

_NAMES = ("base", "tuned")
_SCHEMA = pa.schema(
    [
        ("problem", pa.int64()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("primary", pa.string()),
        ("threshold", pa.float64()),
        ("cap", pa.int64()),
        ("completion", pa.string()),
        ("reward", pa.float32()),
        ("finished", pa.bool_()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("js", pa.list_(pa.float64())),
        ("swapped", pa.list_(pa.bool_())),
        ("changed", pa.list_(pa.bool_())),
        ("ranks", pa.list_(pa.int32())),
    ]
)
_TOP = 3  # The tuned model's likeliest token is looked for among this many likeliest tokens of the base.
_BINS = 40


def rules(settings: Shift) -> list[Rule]:
    """Return the rules: each model by itself, and with the other model at every threshold and under every cap.

    Args:
        settings: Settings of the analysis.
    """
    return [
        rule
        for primary in (0, 1)
        for rule in (
            Rule(primary),
            *(Rule(primary, threshold) for threshold in settings.thresholds),
            *(Rule(primary, settings.threshold, cap) for cap in settings.caps),
        )
    ]


def shift(settings: Shift) -> dict[str, Any]:
    """Run the analysis in its folder and return its summary; see :class:`~tokcredit.analyze.settings.Shift`.

    Args:
        settings: Settings of the analysis.
    """
    settings = dataclasses.replace(settings, study=resolved(settings.study, "shift", settings.base, settings.tuned))
    with opened(settings) as study:
        pair = load_pair(("base", settings.base), ("tuned", settings.tuned), settings.study.precision)
        every_rule, prompts = rules(settings), Prompts(pair.tokenizer, settings.study.chat)

        def make(number: int, problem: Problem) -> pa.Table:
            prompt = prompts(problem)
            seed = np.random.SeedSequence([settings.study.seed, number]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0]) >> 1)
            made = cross(
                pair,
                prompt,
                every_rule,
                settings.rollouts,
                settings.study.max_tokens,
                settings.temperature,
                settings.top_p,
                generator,
            )
            of_row = [rule for rule in every_rule for _ in range(settings.rollouts)]
            return _table(number, problem, prompt, of_row, made, pair.tokenizer)

        found = study.tables(make).to_pylist()
        summary = summarize(found, settings)
        return report(study.folder, summary, _picture(found, summary, settings), _printed(summary, settings))


def _table(
    number: int, problem: Problem, prompt: list[int], of_row: Sequence[Rule], made: Crossed, tokenizer: Any
) -> pa.Table:
    lengths = made.lengths.tolist()

    def cut(x: torch.Tensor) -> list[list[Any]]:
        return [row[:n] for row, n in zip(x.tolist(), lengths, strict=True)]

    responses = tokenizer.batch_decode(cut(made.tokens), skip_special_tokens=True)
    rows = len(responses)
    columns = {
        "problem": [number] * rows,
        "task": [problem.task] * rows,
        "prompt": [problem.question] * rows,
        "primary": [_NAMES[rule.primary] for rule in of_row],
        "threshold": [rule.threshold for rule in of_row],
        "cap": [rule.cap for rule in of_row],
        "completion": responses,
        "reward": Judging()([problem] * rows, responses),
        "finished": made.finished.tolist(),
        "prompt_tokens": [prompt] * rows,
        **{name: cut(getattr(made, name)) for name in ("tokens", "js", "swapped", "changed", "ranks")},
    }
    return pa.table(columns, schema=_SCHEMA)


def _own(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the responses of the tuned model by itself."""
    return [row for row in found if row["primary"] == "tuned" and row["threshold"] == math.inf]


def _joined(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(row[name]) for row in rows])


def summarize(found: Sequence[dict[str, Any]], settings: Shift) -> dict[str, Any]:
    """Return the fractions of shifted tokens along the tuned model's responses, and the accuracy under every rule.

    Args:
        found: Rows of the tables of all problems.
        settings: Settings of the analysis.
    """
    own = _own(found)
    js, ranks = _joined(own, "js"), _joined(own, "ranks")
    shifted = js > settings.threshold
    return {
        "responses": len(own),
        "tokens": len(js),
        "js_mean": float(js.mean()),
        "js_median": float(np.median(js)),
        "share_above": {str(x): float((js > x).mean()) for x in sorted({*settings.thresholds, settings.threshold})},
        "shifted": {
            "threshold": settings.threshold,
            "tokens": int(shifted.sum()),
            "share": float(shifted.mean()),
            "likeliest_of_base": float((ranks[shifted] == 0).mean()) if shifted.any() else None,
            f"in_first_{_TOP}_of_base": float((ranks[shifted] < _TOP).mean()) if shifted.any() else None,
        },
        "rules": [_outcome(found, rule) for rule in rules(settings)],
    }


def _outcome(found: Sequence[dict[str, Any]], rule: Rule) -> dict[str, Any]:
    """Return accuracy, its standard error over problems, and how many tokens the other model chose and changed."""
    rows = [
        row
        for row in found
        if row["primary"] == _NAMES[rule.primary] and row["threshold"] == rule.threshold and row["cap"] == rule.cap
    ]
    rewards: dict[int, list[float]] = {}
    for row in rows:
        rewards.setdefault(row["problem"], []).append(row["reward"])
    means = np.array([np.mean(x) for x in rewards.values()])
    swapped, changed = _joined(rows, "swapped"), _joined(rows, "changed")
    return {
        "primary": _NAMES[rule.primary],
        "threshold": None if rule.threshold == math.inf else rule.threshold,
        "cap": rule.cap,
        "accuracy": float(means.mean()),
        "error": float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
        "swapped_share": float(swapped.mean()),
        "changed_share": float(changed.mean()),
        "changed_per_response": float(changed.sum() / len(rows)),
        "length": len(changed) / len(rows),
    }


def _printed(summary: dict[str, Any], settings: Shift) -> Table:
    shifted = summary["shifted"]
    table = Table(
        *("writes", "other above", "cap", "accuracy", "±", "swapped", "changed", "per response"),
        title=f"{summary['tokens']} tokens of {settings.tuned}: {shifted['share']:.1%} diverge from {settings.base} by "
        f"JS > {settings.threshold:g}",
        title_justify="left",
    )
    for line in summary["rules"]:
        alone = line["threshold"] is None
        table.add_row(
            line["primary"],
            "" if alone else f"{line['threshold']:g}",
            "" if line["cap"] is None else str(line["cap"]),
            f"{line['accuracy']:.3f}",
            "" if line["error"] is None else f"{line['error']:.3f}",
            "" if alone else f"{line['swapped_share']:.1%}",
            "" if alone else f"{line['changed_share']:.1%}",
            "" if alone else f"{line['changed_per_response']:.2f}",
        )
    return table


def _picture(found: Sequence[dict[str, Any]], summary: dict[str, Any], settings: Shift) -> Any:
    from matplotlib.figure import Figure

    own = _own(found)
    js = _joined(own, "js")
    positions = np.concatenate([np.arange(len(row["js"])) for row in own])
    figure = Figure(figsize=(10, 7), layout="constrained")
    (by_threshold, by_count), (spread, along) = figure.subplots(2, 2)
    for i, (name, other) in enumerate((_NAMES, _NAMES[::-1])):
        lines = [line for line in summary["rules"] if line["primary"] == name]
        alone, crossed = lines[0], [line for line in lines[1:] if line["cap"] is None]
        by_threshold.axhline(alone["accuracy"], color=f"C{i}", linestyle=":", label=f"{name} alone")
        by_threshold.errorbar(
            [line["threshold"] for line in crossed],
            [line["accuracy"] for line in crossed],
            [line["error"] or 0 for line in crossed],
            color=f"C{i}",
            marker="o",
            markersize=3,
            capsize=2,
            label=f"{name}, {other} above",
        )
        by_count.scatter(
            [line["changed_per_response"] for line in lines],
            [line["accuracy"] for line in lines],
            color=f"C{i}",
            s=12,
            label=f"{name} writes",
        )
    smallest = min((x for x in settings.thresholds if x > 0), default=0.01)
    by_threshold.set_xscale("symlog", linthresh=smallest)
    spread.hist(js, bins=np.linspace(0, math.log(2), _BINS + 1), weights=np.full(len(js), 1 / len(js)), color="C1")
    spread.set_yscale("log")
    spread.axvline(settings.threshold, color="0.4", linestyle=":")
    edges = np.linspace(0, positions.max() + 1, min(_BINS, positions.max() + 1) + 1)
    total, above = (np.histogram(x, edges)[0] for x in (positions, positions[js > settings.threshold]))
    along.stairs(above / np.maximum(total, 1), edges, color="C1", fill=True)
    for axes, title, x in (
        (by_threshold, "accuracy", "the other model chooses above this divergence, nats"),
        (by_count, "accuracy", "changed tokens per response"),
        (spread, "fraction of the tuned model's tokens", "Jensen-Shannon divergence, nats"),
        (along, f"fraction of tokens with divergence > {settings.threshold:g}", "position in the response"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (by_threshold, by_count):
        axes.legend(frameon=False, fontsize=8)
    return figure
