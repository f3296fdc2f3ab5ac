"""The page: one HTML file that fetches nothing and computes nothing, and in which untrusted text stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tokcredit.report import packing
from tokcredit.report.data import Data, Table
from tokcredit.report.summary import summarize
from tokcredit.report.vocabulary import visible

LIMIT = 5_000_000
ASSETS = Path(__file__).parent / "assets"
SCRIPTS = (
    "decode",
    "colour",
    "chart",
    "run",
    "pictures",
    "tree",
    "card",
    "episode",
    "pair",
    "text",
    "tools",
    "group",
    "page",
)
SNIPPET = 240
NOTE, TAG = 200, 60


def render(data: Data, limit: int = LIMIT) -> str:
    """Return the page as HTML.

    Args:
        data: The tables.
        limit: Largest size in bytes. Where not all prompts fit, log-probs lose a decimal, then prompts are left out,
            evenly over the run, and the page says so. The figures of the run always count all prompts.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # the methods' order is the caller's
    template = environment.get_template("report.html.j2")
    words, places = packing.vocabulary(data)
    vocabulary = packing.blob(json.dumps(words, ensure_ascii=False).encode("utf-8", "replace"))
    style = (ASSETS / "report.css").read_text()
    script = "\n".join((ASSETS / f"{name}.js").read_text() for name in SCRIPTS)
    header = {
        "name": visible(data.run.name),
        "step": data.run.step,
        "settings": {key: visible(value) for key, value in data.run.settings.items()},
        "notes": data.notes,
        "summary": _finite(summarize(data)),
        "methods": {name: visible(repr(objective), 2000) for name, objective in data.objectives.items()},
        "with_ratio": sorted(data.with_ratio),
        "with_margin": sorted(data.with_margin),
        "prompts": [_entry(data, group) for group in range(len(data.groups["prompt"]))],
    }

    def page(header: Table, blobs: dict[int, str]) -> str:
        return template.render(
            title=visible(Path(data.run.name).name),
            style=style,
            script=script,
            header=header,
            vocabulary=vocabulary,
            blobs=blobs,
        )

    blobs, notes = _fitting(data, places, limit - len(page(header, {}).encode()) - NOTE)
    shown = {**header, "notes": data.notes + notes, "prompts": [header["prompts"][group] for group in blobs]}
    return page(shown, blobs)


def _fitting(data: Data, places: Any, room: int) -> tuple[dict[int, str], list[str]]:
    """Return blobs by group, as many as fit, and a note on those left out."""
    decimals = {name: packing.decimals_for(table["advantage"]) for name, table in data.methods.items()}
    groups = list(range(len(data.groups["prompt"])))
    blobs: dict[int, str] = {}
    for digits in (packing.LOG_PROB + 1, packing.LOG_PROB):
        blobs = {g: packing.group_blob(data, g, places, decimals, digits) for g in groups}
        if _size(blobs, groups) <= room:
            return blobs, []
    # The largest number of evenly spread prompts that fit.
    for count in range(len(groups) - 1, 0, -1):
        kept = np.unique(np.linspace(0, len(groups) - 1, count).round().astype(int)).tolist()
        if count == 1 or _size(blobs, kept) <= room:
            note = (
                f"{len(kept)} of {len(groups)} prompts are shown, evenly spread over the run; "
                "the figures of the run count all of them."
            )
            return {g: blobs[g] for g in kept}, [note]
    return blobs, []


def _size(blobs: dict[int, str], groups: list[int]) -> int:
    return sum(len(blobs[group]) + TAG for group in groups)


def _entry(data: Data, group: int) -> Table:
    """Return a prompt for the list."""
    rewards = data.rollouts["reward"][data.rollouts["group"] == group]
    return {
        "group": group,
        "prompt": visible(data.groups["prompt"][group], SNIPPET),
        "rewards": rewards.tolist(),
        "mean": float(data.groups["mean"][group]),
        "differ": bool(data.groups["differ"][group]),
    }


def _finite(x: Any) -> Any:
    """Return the same with None for numbers that are not finite, which JSON does not have."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not np.isfinite(x) else x
