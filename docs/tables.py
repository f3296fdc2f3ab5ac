"""Writes the tables of docs/methods.md, docs/hosts.md and README.md from the methods: ``python docs/tables.py``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokcredit as tc
from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import policy_methods, require, require_constant, require_independent_rows

ROOT = Path(__file__).parents[1]
PLAIN = {tc.Objective: "grpo", tc.Preference: "dpo", tc.Supervised: "sft"}
COMMON = {"old_log_probs", "rollout_log_probs", "ref_log_probs"}
HEADINGS = "Args|Cost|References|Differences from the paper|Differences from the released code"


def compact(x: object) -> str:
    """Return a stage as one would write it, without the settings that have their default.

    Args:
        x: A stage, a tuple of stages or the value of a setting.
    """
    if isinstance(x, tuple):
        return ", ".join(map(compact, x)) or "none"
    if not dataclasses.is_dataclass(x):
        return f"{x:g}" if isinstance(x, float) else repr(x)
    settings = []
    for f in dataclasses.fields(x):
        value = getattr(x, f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if value != default:
            settings.append(f"{f.name}={compact(value)}")
    return type(x).__name__ + (f"({', '.join(settings)})" if settings else "")


def sections(name: str) -> dict[str, str]:
    """Return the parts of a method's docstring by their headings, the first line under ``Summary``.

    Args:
        name: Name of the method.
    """
    text = inspect.getdoc(getattr(tc.methods, name)) or ""
    parts = re.split(rf"^({HEADINGS}):", text, flags=re.M)
    return {"Summary": parts[0].split("\n\n")[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def markdown(text: str) -> str:
    """Return a piece of a docstring as one line of Markdown.

    Args:
        text: The piece.
    """
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def facts(body: str) -> list[str]:
    """Return the items of a list in a docstring, each as one line of Markdown.

    Args:
        body: The list.
    """
    return [markdown(item) for item in re.split(r"^ +- ", body, flags=re.M)[1:]]


def table_cell(text: str) -> str:
    """Return a piece of a docstring as a cell of a Markdown table.

    Args:
        text: The piece.
    """
    return markdown(text).replace("|", "\\|")


def changes(name: str) -> str:
    """Return the stages at which a method differs from the plain method of its kind.

    Args:
        name: Name of the method.
    """
    objective: Any = tc.methods.load(name)
    plain = tc.methods.load(PLAIN[type(objective)])
    differing = [f.name for f in dataclasses.fields(objective) if getattr(objective, f.name) != getattr(plain, f.name)]
    return "; ".join(f"{stage}: `{compact(getattr(objective, stage))}`" for stage in differing) or "-"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table.

    Args:
        header: Names of the columns.
        rows: Cells of each row.
    """
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def methods() -> str:
    """Return the table of all methods."""
    rows = []
    for name in tc.methods.names():
        parts, objective = sections(name), tc.methods.load(name)
        reads = ", ".join(f"`{x}`" for x in sorted(objective.required_inputs)) or "-"
        kind = type(objective)
        rows.append(
            (
                f"[`{name}`](#{name})",
                markdown(parts["Summary"]),
                f"`{kind.__name__}`, `{PLAIN[kind]}`",
                changes(name),
                reads,
                markdown(parts["Cost"]),
                markdown(parts["References"]),
            )
        )
    return table(
        ("method", "what", "objective, compared with", "other stages", "required inputs", "cost", "references"), rows
    )


def differences() -> str:
    """Return, for each method, how it differs from its paper and from released code."""
    text = []
    for name in tc.methods.names():
        text.append(f"### {name}")
        for heading, body in sections(name).items():
            if heading.startswith("Differences"):
                text.append(f"{heading}:\n\n" + "\n".join(f"- {fact}" for fact in facts(body)))
    return "\n\n".join(text)


def inputs() -> str:
    """Return the table of all registered inputs."""
    entries = [tc.inputs.get(name) for name in sorted(tc.inputs.names(), key=lambda x: (tc.inputs.get(x).per, x))]
    rows = [
        (f"`{x.name}`", f"{x.dtype} `{x.shape}`", markdown(x.meaning), tc.inputs.COLLECTORS[x.collector])
        for x in entries
    ]
    return table(("input", "dtype and shape", "meaning", "obtained from"), rows)


def check_trl(objective: tc.Objective) -> None:
    """Raise an error if TRL's ``GRPOTrainer`` cannot carry an objective, whatever its settings are.

    Args:
        objective: The objective.
    """
    require_constant(objective, "TRL", schedules=True)
    require_independent_rows(objective, "TRL")
    require(objective, COMMON | {"entropies"}, "TRL", ("log_probs", "entropies"))


def check_two_phase(objective: tc.Objective, carries: set[str]) -> None:
    """Raise an error if a host with advantages in one place and the loss in another cannot carry an objective.

    Args:
        objective: The objective.
        carries: Inputs of the host.
    """
    require(two_phase.advantage_part(objective, "the host"), carries, "the host")
    two_phase.loss_part(objective, "the host", "")


def hosts() -> str:
    """Return the table of the hosts in which each method runs with its default settings."""
    checks: tuple[Callable[[tc.Objective], None], ...] = (
        check_trl,
        lambda objective: check_two_phase(objective, COMMON | {"entropies"}),
        lambda objective: check_two_phase(objective, COMMON),
    )
    rows = []
    for name in policy_methods():
        cells = [f"[`{name}`](methods.md#{name})"]
        for check in checks:
            try:
                check(tc.methods.load(name))
                cells.append("yes")
            except ValueError:
                cells.append("-")
        rows.append((*cells,))
    return table(("method", "TRL `GRPOTrainer`", "verl", "SkyRL, OpenRLHF, AReaL"), rows)


def short() -> str:
    """Return the table of the names and first lines of all methods."""
    return table(
        ("method", "what"), [(f"`{name}`", markdown(sections(name)["Summary"])) for name in tc.methods.names()]
    )


def filled(text: str) -> str:
    """Return a document with what is between its marks replaced by what it is now.

    Args:
        text: The document.
    """
    for make in (methods, differences, inputs, hosts, short):
        mark = f"<!-- {make.__name__} -->"
        text = re.sub(f"{mark}.*?{mark}", lambda _, m=mark, f=make: f"{m}\n{f()}\n{m}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for path in (ROOT / "docs/methods.md", ROOT / "docs/hosts.md", ROOT / "README.md"):
        path.write_text(filled(path.read_text()))
