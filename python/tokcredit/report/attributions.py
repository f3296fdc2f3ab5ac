"""The page of scores that ``tokcredit analyze attribute`` writes: prompts whose tokens are coloured by their scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokcredit.report import records
from tokcredit.report.vocabulary import visible

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("colour", "card", "attribution")
_TEXTS, _NUMBERS = ("prompt_texts", "response_texts"), ("scores", "importance")


def read(path: Path) -> list[records.Record] | None:
    """Return the records of a file of attributions, or None if it is another file.

    Args:
        path: A file or a folder.

    Raises:
        ValueError: Scores and tokens do not fit together, or a number is not finite.
    """
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    found, _ = records.load(path)
    if not found or not all({*_TEXTS, *_NUMBERS} <= record.keys() for record in found):
        return None
    for number, record in enumerate(found):
        for problem in _problems(record):
            raise ValueError(f"{problem} in row {number} of {path}, got others")
    return found


def _problems(record: records.Record) -> Iterator[str]:
    for name in _TEXTS:
        if not isinstance(record[name], list) or not all(isinstance(x, str) for x in record[name]):
            yield f"{name}: expected a list of texts"
            return
    tokens, rows = len(record["prompt_texts"]), max(1, len(record["response_texts"]))
    if not _are_numbers(record["importance"], tokens):
        yield f"importance: expected {tokens} finite numbers"
    scores = record["scores"]
    if not isinstance(scores, list) or len(scores) != rows or not all(_are_numbers(row, tokens) for row in scores):
        yield f"scores: expected {rows} lists of {tokens} finite numbers"


def _are_numbers(x: Any, count: int) -> bool:
    return isinstance(x, list) and len(x) == count and all(type(y) in (int, float) and math.isfinite(y) for y in x)


def render(found: list[records.Record], name: str) -> str:
    """Return the page as HTML.

    Args:
        found: The records, from :func:`read`.
        name: Name of the file.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_ASSETS), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("attribution.html.j2").render(
        title=visible(name),
        style=(_ASSETS / "report.css").read_text(),
        script="\n".join((_ASSETS / f"{script}.js").read_text() for script in _SCRIPTS),
        records=[_shown(record) for record in found],
    )


def _shown(record: records.Record) -> dict[str, Any]:
    about = [visible(str(record[key])) for key in ("model", "method") if record.get(key) is not None]
    if record.get("class") is not None:
        about.append(f"class {visible(str(record['class']))}")
    texts = {name: [visible(text) for text in record[name]] for name in _TEXTS}
    numbers = {"importance": _rounded(record["importance"]), "scores": [_rounded(row) for row in record["scores"]]}
    return {"about": about, **texts, **numbers}


def _rounded(x: list[float]) -> list[float]:
    return [float(f"{y:.4g}") for y in x]
