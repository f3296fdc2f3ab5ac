"""Hierarchy-aware credit assignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import number
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.token_weights import TokenWeight


@dataclass(frozen=True)
class favoured(TokenWeight):
    """``1 + strength * sign(A)`` at planning tokens, 1 elsewhere.

    Args:
        strength: Change of the advantage of a planning token relative to its size, from 0 to 1.
    """

    strength: float = number(0.2, at_least=0, at_most=1, scheduled=True)
    reads: ClassVar[frozenset[str]] = frozenset({"planning_tokens"})

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        favoured = per_token(1 + self.strength * advantages.sign(), batch.spans)
        return favoured.masked_fill(~batch.input("planning_tokens"), 1)


def hicra(strength: float = 0.2, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """HICRA: GRPO that raises the advantage of planning tokens, in good responses and in bad ones.

    With ``A`` the advantage of GRPO and ``m`` 1 at the tokens of planning phrases, else 0::

        A'[i, t] = A[i] + strength * |A[i]| * m[i, t]

    The loss is GRPO's with ``A'``. Which tokens belong to a planning phrase is an input, ``planning_tokens``.

    Args:
        strength: Change of the advantage of a planning token relative to its size; the paper's alpha.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO. The caller finds the planning phrases.
    References: arXiv 2509.03646.
    Differences from the paper:
        - None known; its formula was read in third-party code.
    Differences from the released code:
        - The proposed port to TRL also raises tokens above the 70 % quantile of the row's entropies in long correct
          responses. That is not offered.
    """
    return Objective(
        token_weights=(favoured(strength),),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.sequence_mean(),
    )
