"""Credit for the progress of turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip, credit
from tokcredit.stages.base import number
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.values import as_float


@dataclass(frozen=True)
class progress(Credit):
    """The changes of ``turn_scores``, each shared among the turn that made it and those before.

    With ``s`` the score of the state after a turn, and k counted from 0::

        delta[k] = s[k] - (score of the last scored turn before k)    0 without a score, and at the first with one
        c[i] = sum over k >= i of delta[k] * discount ** (k - i) / (1 + discount + ... + discount ** k)

    The sum of c over the turns is the last score minus the first.

    Args:
        discount: How fast the share of earlier turns falls, from 0 to 1.
    """

    discount: float = number(0.9, at_least=0, at_most=1)
    reads: ClassVar[frozenset[str]] = frozenset({"turn_scores"})

    def __call__(self, batch: Rollouts) -> Tensor:
        turns = batch.turns
        scores = as_float(batch.input("turn_scores").index_select(0, turns.last))
        scored = ~scores.isnan()
        rows = turns.of_row(scored)
        before = ops.scan(scores, rows, decay=0.0, exclusive=True)[0]
        earlier = ops.scan(torch.ones_like(scores), rows, exclusive=True)[0]
        delta = torch.where(scored & (earlier > 0), scores - before, 0)
        shares = ops.scan(torch.ones_like(scores), turns.of_row(), decay=self.discount)[0]
        spread = ops.scan(delta / shares, turns.of_row(), decay=self.discount, reverse=True)[0]
        return ops.spread(spread, turns.spans)


def turn_progress(
    discount: float = 0.9,
    weight: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO plus credit for turns after which the environment scores the state higher, shared with earlier turns.

    With ``s`` the score of the state after a turn::

        delta[k] = s[k] - (score of the last scored turn before k)
        c[i] = sum over k >= i of delta[k] * discount ** (k - i) / (1 + discount + ... + discount ** k)
        A[i] = (R - mean(R)) / (std(R) + epsilon) + weight * c[i]

    The changes sum to the last score minus the first, so that to stop early is neither rewarded nor punished.

    Args:
        discount: How fast the share of earlier turns falls, from 0 to 1.
        weight: Factor of the progress.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.

    Cost: GRPO plus a score of the state after turns.
    References: A proposal for prime-rl, github.com/PrimeIntellect-ai/prime-rl/pull/3282; GRPO, arXiv 2402.03300.
    Differences from the released code:
        - How the proposal adds the progress to the advantage, and its ``discount``, were not found.
    """
    return Objective(
        credit.sum(credit.group_normalized(epsilon=epsilon), progress(discount), weight),
        clip=clip.ppo(clip_low, clip_high),
    )
