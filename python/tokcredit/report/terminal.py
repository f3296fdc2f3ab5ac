"""One prompt in the terminal: figures, the prefix tree, and the rollouts coloured by the advantages of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tokcredit.report.data import Data
from tokcredit.report.summary import summarize
from tokcredit.report.vocabulary import visible

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 160
LEGEND = (
    "token-level: the token's advantage A differs from the median of its rollout\n"
    "blue: positive advantage, orange: negative advantage, underlined: branch"
)
BLUE, ORANGE = (26, 104, 190), (214, 92, 12)


def show(data: Data, prompt: int = 1, console: Console | None = None) -> None:
    """Print one prompt.

    Args:
        data: The tables.
        prompt: Number of the prompt, from 1.
        console: A ``rich`` console, or None for a new one on standard output.

    Raises:
        ValueError: There is no such prompt.
    """
    from rich.console import Console

    count = len(data.groups["prompt"])
    if not 1 <= prompt <= count:
        raise ValueError(f"prompt: expected a number from 1 to {count}, got {prompt}")
    console = console or Console()
    group = prompt - 1
    figures = summarize(data)
    console.print(_head(data, group, count))
    console.print(_figures(figures, data))
    console.print(_text(LEGEND, "dim"))
    for note in data.notes:
        console.print(_text(note, "italic"))
    console.print()
    console.print(_tree(data, group))
    console.print()
    console.print(_rollouts(data, group, figures))


def _text(text: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(text, style=style)  # never markup: rollouts are untrusted


def _head(data: Data, group: int, count: int) -> Any:
    groups = data.groups
    step = "" if data.run.step is None else f", step {data.run.step}"
    head = _text(f"{visible(data.run.name)}{step}, prompt {group + 1} of {count}\n", "dim")
    head.append(visible(groups["prompt"][group], 2000), "bold")
    own = data.nodes["group"] == group
    shared = f"{groups['tokens'][group]} tokens, {data.nodes['length'][own].sum()} distinct"
    head.append(f"\n{groups['rollouts'][group]} rollouts, mean reward {groups['mean'][group]:.3f}, {shared}", "dim")
    return head


def _figures(figures: dict[str, Any], data: Data) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("method", style="bold")
    for name in ("token-level tokens", "token-level |A|", "has gradient", "clipped", "effective sample"):
        table.add_column(name, justify="right")
    if data.with_margin:
        table.add_column("mean margin", justify="right")
    for method, f in figures["methods"].items():
        unknown = "–" if method in data.with_ratio else "not applicable"
        margin = "not applicable" if "margin" not in f else "–" if f["margin"] is None else f"{f['margin']:.3f}"
        table.add_row(
            method,
            *(f"{f[key]:.1%}" for key in ("token_level", "token_level_advantage", "has_gradient")),
            *(unknown if f[key] is None else f"{f[key]:.1%}" for key in ("clipped", "effective")),
            *([margin] if data.with_margin else []),
        )
    return table


def _tree(data: Data, group: int) -> Any:
    from rich.tree import Tree

    nodes, rollouts = data.nodes, data.rollouts
    places = np.flatnonzero(nodes["group"] == group)
    source: dict[int, int] = {}
    for row in np.flatnonzero(rollouts["group"] == group):
        v = int(rollouts["leaf"][row])
        while v >= 0:
            source.setdefault(v, int(row))
            v = int(nodes["parent"][v])
    drawn: dict[int, Any] = {}
    for v in places.tolist():
        begin = int(rollouts["begin"][source[v]] + nodes["depth"][v])
        ids = data.tokens["token"][begin : begin + min(int(nodes["length"][v]), 24)].tolist()
        words = "".join(data.run.vocabulary.texts(ids)).replace("\n", "↵")
        label = _text(f"{nodes['value'][v]:.3f} ", _style(nodes["value"][v] - nodes["before"][v], 0.5))
        label.append(f" {nodes['count'][v]}× {nodes['length'][v]} tokens ", "dim")
        label.append(words if len(words) <= 60 else f"{words[:59]}…")
        parent = int(nodes["parent"][v])
        drawn[v] = Tree(label, guide_style="dim") if parent < 0 else drawn[parent].add(label)
    return drawn[places[0]] if len(places) else _text("(no rollouts)")


def _rollouts(data: Data, group: int, figures: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 1, 0), header_style="dim")
    for name in ("rollout", "reward", "tokens"):
        table.add_column(name, justify="right")
    for method in data.methods:
        table.add_column(method, ratio=1)
    for number, row in enumerate(np.flatnonzero(data.rollouts["group"] == group), 1):
        begin, length = int(data.rollouts["begin"][row]), int(data.rollouts["length"][row])
        texts = data.run.vocabulary.texts(data.tokens["token"][begin : begin + min(length, SHOWN)].tolist())
        cells = [
            _coloured(
                texts, t["advantage"][begin:], data.tokens["branch"][begin:], figures["methods"][m]["scale"], length
            )
            for m, t in data.methods.items()
        ]
        table.add_row(str(number), f"{data.rollouts['reward'][row]:.3f}", str(length), *cells)
    return table


def _coloured(texts: list[str], advantages: Any, branches: Any, scale: float, length: int) -> Any:
    out = _text("")
    for text, advantage, branch in zip(texts, advantages, branches, strict=False):
        out.append(text, f"{_style(advantage, scale)} {'underline bold' if branch else ''}")
    if length > len(texts):
        out.append(f" … {length - len(texts)} more", "dim")
    return out


def _style(x: float, scale: float) -> str:
    """Return dark text on blue above zero and on orange below, and no colour at zero."""
    share = min(1.0, abs(float(x)) / scale) * 0.7
    if not share > 0:
        return ""
    mixed = [round(255 + (c - 255) * share) for c in (BLUE if x > 0 else ORANGE)]
    return f"#111111 on #{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"
