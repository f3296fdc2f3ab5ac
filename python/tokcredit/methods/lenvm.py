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
class length_advantage(Credit):
    """Another credit plus ``scale`` times the generalized advantage of the length.

    ``V`` is the input ``length_values``, ``-(1 - gamma ** l)`` with ``l`` the predicted number of tokens still to come,
    and 0 after the last token of a row::

        delta[t] = -(1 - gamma) + gamma * V[t + 1] - V[t]
        A_length[t] = delta[t] + gamma * trace * A_length[t + 1]

    Rows that are ``truncated`` go on as predicted before their last token; see :func:`tokcredit.length.advantages`.

    Args:
        of: The other credit.
        scale: Factor of the length advantage. Above 0 it shortens rows, below 0 it lengthens them.
        gamma: Discount of the value head, above 0 and below 1.
        trace: Lambda of the generalized advantage, from 0 to 1.
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
    """LenVM: GRPO plus, for each token, by how much it made the response shorter than a value head had predicted.

    The head predicts ``V = -(1 - gamma ** l)``, with ``l`` the number of tokens still to come, and 0 at the end::

        delta[t] = -(1 - gamma) + gamma * V[t + 1] - V[t]
        A_length[t] = delta[t] + gamma * trace * A_length[t + 1]
        A[t] = (r - mean(r)) / (std(r) + epsilon) + scale * A_length[t]

    ``tokcredit.length`` has the targets and losses of the head and the conversion to tokens, and
    ``tokcredit.decoding.length`` the decoding.

    Args:
        scale: Factor of the length advantage. Above 0 it shortens responses, below 0 it lengthens them.
        gamma: Discount of the head, above 0 and below 1; ``tokcredit.length.gamma_for`` gives it for the 99th
            percentile of the lengths.
        trace: Lambda of the generalized advantage, from 0 to 1. With 1 the prediction is compared with the actual
            length.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.

    Cost: GRPO plus a value head on the hidden states of the old policy and one scan along the rows.
    References: arXiv 2604.27039.
    Differences from the paper:
        - The paper describes this use of the head in its appendix, without an experiment. ``scale`` and ``trace`` are
          suggestions.
        - A response that was cut at the length limit goes on as the head predicted before its last token. It was not
          short because it was cut.
    Differences from the released code:
        - The released code has the head and the decoding, but not this use.
    """
    return Objective(
        length_advantage(group_normalized(epsilon=epsilon), scale, gamma, trace),
        clip=clip.ppo(clip_low, clip_high),
    )
