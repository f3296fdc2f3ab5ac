"""Draw docs/assets/tree.svg: the prefix tree of four responses, and the advantage of every token with two methods.

Run ``python docs/figures.py``. It needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import tokcredit as tc
import torch
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
RESPONSES = (("24", "+3", "27"), ("24", "+3", "28"), ("48", "/5", "9.6"), ("24", "+3", "27"))
REWARDS = (1.0, 0.0, 0.0, 1.0)
HEIGHTS = {("24",): 2.0, ("24", "+3"): 2.0, ("24", "+3", "27"): 3.0, ("24", "+3", "28"): 1.0}
HEIGHTS |= {("48",): 0.0, ("48", "/5"): 0.0, ("48", "/5", "9.6"): 0.0}
METHODS = {"GRPO": tc.methods.grpo, "TEMPO": tc.methods.tempo}
GREY = "#808080"  # read on white and on black


def advantages(method: str) -> dict[tuple[str, ...], float]:
    """Return the advantage of the last token of every prefix.

    Args:
        method: Name of the method, as the picture shows it.
    """
    words = sorted({word for row in RESPONSES for word in row})
    tokens = torch.tensor([[words.index(word) for word in row] for row in RESPONSES])
    mask, groups = torch.ones_like(tokens, dtype=torch.bool), torch.zeros(len(tokens), dtype=torch.long)
    batch = tc.Rollouts.from_padded(tokens, mask, groups, torch.tensor(REWARDS))
    found = METHODS[method]().prepare(batch).advantages
    places = {row[: t + 1]: (r, t) for r, row in reversed(list(enumerate(RESPONSES))) for t in range(len(row))}
    return {prefix: found[place].item() for prefix, place in places.items()}


def draw(axes: Any, method: str) -> None:
    """Draw the tree with the advantages of one method.

    A token that several responses share has one advantage for each of them; the picture shows that of the first.

    Args:
        axes: Axes of matplotlib.
        method: Name of the method.
    """
    scale, colors = matplotlib.colors.Normalize(-3, 3), matplotlib.colormaps["RdYlGn"]
    axes.set_title(method, color=GREY, fontsize=13)
    axes.plot(-0.45, 1.2, "o", color=GREY)
    for prefix, advantage in advantages(method).items():
        x, y = len(prefix) - 0.5, HEIGHTS[prefix]
        before = HEIGHTS.get(prefix[:-1], 1.2)
        axes.plot([x - 0.95 if len(prefix) == 1 else x - 0.7, x - 0.3], [before, y], color=GREY, zorder=0)
        box = {"boxstyle": "round,pad=0.35", "facecolor": colors(scale(advantage)), "edgecolor": GREY}
        text = f"{prefix[-1]}\n{advantage:+.2f}"
        axes.text(x, y, text, ha="center", va="center", color="black", bbox=box, fontsize=11)
        if len(prefix) == 3:
            right = any(row == prefix and reward for row, reward in zip(RESPONSES, REWARDS, strict=True))
            count = sum(row == prefix for row in RESPONSES)
            label = f"{count} x {'correct' if right else 'wrong'}"
            axes.text(x + 0.45, y, label, ha="left", va="center", color=GREY, fontsize=11)
    axes.set(xlim=(-0.7, 3.8), ylim=(-0.7, 3.6))
    axes.axis("off")


def main() -> None:
    """Write the picture."""
    matplotlib.rcParams |= {"svg.hashsalt": "tokcredit", "font.family": "DejaVu Sans"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    for one, method in zip(axes, METHODS, strict=True):
        draw(one, method)
    figure.savefig(HERE / "assets/tree.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
