"""Losses and gradients that are not finite: the tokens that they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokcredit.protocol import PreparedBatch, TrainingObjective

_SHOWN = 5


def tokens(
    objective: TrainingObjective[Any], part: PreparedBatch, variables: Mapping[str, Tensor]
) -> dict[int, list[int]]:
    """Return the tokens at which a variable is not finite; in rows without, those at which the gradient is not.

    A variable that is not finite makes the gradients of other tokens so, for example where ratios are cumulative. It
    does harm at tokens that do not train too, because 0 times infinity is not 0.

    Args:
        objective: The objective.
        part: Prepared rows, packed.
        variables: Values of the objective's variables, float ``[N]`` each.

    Returns:
        Positions in the row, from 0, by the number of the row.
    """
    leaves = {name: variables[name].detach().requires_grad_() for name in objective.variables}
    first, *others = objective.variables
    loss = objective.loss(part, leaves[first], **{name: leaves[name] for name in others}).loss
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    lengths = (part.batch.end - part.batch.begin).tolist()
    found: dict[int, list[int]] = {}
    for values in (leaves.values(), gradients):
        bad = torch.zeros_like(part.mask)
        for x in values:
            if x is not None:
                bad |= ~x.isfinite()
        for row, at in enumerate(bad.cpu().split(lengths)):
            if at.any():
                found.setdefault(row, at.nonzero()[:, 0].tolist())
    return found


def described(found: Mapping[int, list[int]]) -> list[str]:
    """Return a text for each of the first rows, and one for the number of the others.

    Args:
        found: Positions of tokens by the number of the row; none where only the gradient of the model is not finite.
    """
    texts = [f"row {row}" + _positions(positions) for row, positions in sorted(found.items())]
    return texts[:_SHOWN] + ([f"{len(texts) - _SHOWN} more rows"] if len(texts) > _SHOWN else [])


def _positions(positions: list[int]) -> str:
    if not positions:
        return ""
    shown = ", ".join(map(str, positions[:_SHOWN])) + (", ..." if len(positions) > _SHOWN else "")
    return f" at token{'s' if len(positions) > 1 else ''} {shown}"
