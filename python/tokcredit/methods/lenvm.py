"""Length value model."""

from __future__ import annotations


from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import length
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip
from tokcredit.stages.base import number, part
from tokcredit.stages.credit import Credit, group_normalized
from tokcredit.stages.credit.group import per_token


@dataclass(frozen=True)
class shortening(Credit):
    """Another credit plus ``scale`` times how much shorter than predicted each token made the row.

    ``length_values`` are ``-(1 - gamma^l)``, l being the predicted tokens to go; the added term is their generalized
    advantage (:func:`tokcredit.length.advantages`), in which rows ``truncated`` go on as predicted. A negative scale
    lengthens.
    """

    of: Credit = part(Credit, group_normalized)
    scale: float = number(0.1)
    gamma: float = number(0.997, above=0, below=1)
    trace: float = number(1.0, at_least=0, at_most=1)
    reads: ClassVar[frozenset[str]] = frozenset({"length_values", "truncated"})

    def __call__(self, batch: Rollouts) -> Tensor:
        advantages, value = per_token(self.of(batch), batch.spans), batch.input("length_values")
        shorter = length.advantages(value, batch.spans, self.gamma, self.trace, batch.input("truncated"))
        return torch.add(advantages, shorter, alpha=self.scale)


def lenvm(
    scale: float = 0.1,
    gamma: float = 0.997,
    trace: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO plus, per token, how much shorter than predicted it made the row.

    A head predicts ``-(1 - gamma^l)``, l being the tokens still to come; the added term is the generalized advantage of
    a cost of ``1 - gamma`` per token against that prediction. ``tokcredit.length`` has targets, losses, the way back
    to tokens, and decoding.

    Args:
        scale: of the added term; above 0 shortens, below 0 lengthens.
        gamma: that of the head; ``tokcredit.length.gamma_for`` the 99th percentile of lengths.
        trace: lambda of the advantage; 1 compares with the actual length.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: as GRPO, plus a value head on the old policy's hidden states and a scan along the rows.
    Source: arXiv 2604.27039.
    Departs from the paper: which describes this use without an experiment; scale and trace are ours, and so is that a
    row cut at the length limit goes on as predicted before its last token: cutting it did not make it short.
    """
    return Objective(
        shortening(group_normalized(epsilon=epsilon), scale, gamma, trace),
        clip=clip.ppo(clip_low, clip_high),
    )
