"""Writes the tables of docs/methods.md and README.md from the methods themselves: ``python docs/tables.py``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import tokcredit as tc

ROOT = Path(__file__).parents[1]


def compact(x: object) -> str:
    """A choice as one would write it, without the settings that have their default."""
    if isinstance(x, tuple):
        return ", ".join(map(compact, x)) or "none"
    if not dataclasses.is_dataclass(x):
        return f"{x:g}" if isinstance(x, float) else repr(x)
    settings = []
    for f in dataclasses.fields(x):
        value = getattr(x, f.name)
        default = f.default_factory() if f.default is dataclasses.MISSING and callable(f.default_factory) else f.default
        if value != default:
            settings.append(f"{f.name}={compact(value)}")
    return type(x).__name__ + (f"({', '.join(settings)})" if settings else "")


def described(name: str) -> dict[str, str]:
    """The parts of a method's docstring, by their first word; the first line under ``Summary``."""
    text = inspect.getdoc(getattr(tc.methods, name)) or ""
    parts = {"Summary": text.split("\n\n")[0]}
    for head, body in re.findall(
        r"^(Cost|Source|Departs)(?: from the [\w ]+)?: (.*?)(?=^\S+[\w ]*: |\Z)", text, re.M | re.S
    ):
        parts[head] = body
    return {head: " ".join(body.replace("``", "`").split()) for head, body in parts.items()}


def changes(name: str) -> str:
    """The stages at which a method differs from ``grpo``, and what it chooses there."""
    plain, objective = tc.methods.grpo(), tc.methods.load(name)
    differing = [f.name for f in dataclasses.fields(objective) if getattr(objective, f.name) != getattr(plain, f.name)]
    return "; ".join(f"{stage} `{compact(getattr(objective, stage))}`" for stage in differing) or "-"


def link(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", source.rstrip("."))


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def methods() -> str:
    rows = []
    for name in tc.methods.names():
        parts, required_inputs = described(name), sorted(tc.methods.load(name).required_inputs)
        what = ", ".join(f"`{need}`" for need in required_inputs) or "-"
        rows.append(
            (f"`{name}`", parts["Summary"], changes(name), what, parts["Cost"], link(parts["Source"]), parts["Departs"])
        )
    return table(("method", "what", "differs from `grpo` in", "needs", "cost", "source", "departs"), rows)


def evidence() -> str:
    rows = [(f"`{n}`", f"{e.kind} `{e.shape}`", e.meaning, e.source) for n, e in tc.inputs.KNOWN.items()]
    return table(("name", "what", "meaning", "computed by"), rows)


def short() -> str:
    return table(("method", "what"), [(f"`{name}`", described(name)["Summary"]) for name in tc.methods.names()])


def filled(text: str) -> str:
    """The document with each table between its marks replaced by what it is now."""
    for make in (methods, evidence, short):
        mark = f"<!-- {make.__name__} -->"
        text = re.sub(f"{mark}.*?{mark}", lambda _, m=mark, f=make: f"{m}\n{f()}\n{m}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for path in (ROOT / "docs/methods.md", ROOT / "README.md"):
        path.write_text(filled(path.read_text()))
