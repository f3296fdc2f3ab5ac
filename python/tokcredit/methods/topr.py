"""Tapered off-policy REINFORCE."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, ratio
from tokcredit.stages.base import InputName
from tokcredit.stages.clip import Clip, Window
from tokcredit.stages.credit import Credit, group_normalized


@dataclass(frozen=True)
class reward(Credit):
    """The reward itself, without a baseline."""

    def __call__(self, batch: Rollouts) -> Tensor:
        return batch.rewards[:, None]


@dataclass(frozen=True)
class tapered(Clip):
    """Weight 1 where ``A >= 0``, and the ratio, at most 1, where ``A < 0``."""

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        low = torch.zeros_like(advantages).masked_fill_(advantages < 0, -math.inf)
        gate = {"on": "ratio", "outside_low": 1.0, "outside_high": 1.0, "both_sides": True}
        return Window("gated", low, 0.0, gate=gate)


def topr(baseline: bool = True, token_ratio: bool = False, to: InputName = "old_log_probs") -> Objective:
    """TOPR: good responses are imitated with weight 1, bad ones are weighted by their ratio, which is cut at 1.

    A bad response that has become improbable is therefore not pushed down further. With ``sg`` the stop-gradient::

        q[i] = exp(sum over t of (log p - log p_to))
        loss = mean over all tokens of -A * sg(1 if A >= 0 else min(q[i], 1)) * log p

    Args:
        baseline: Whether ``A`` is the advantage of GRPO; otherwise it is the reward, as in the paper.
        token_ratio: Whether ``q`` is the ratio of each token, as in ROLL and Trinity-RFT, instead of the response's.
        to: Input with the log-probs that the ratio divides by.

    Cost: The same as GRPO.
    References: arXiv 2503.14286.
    Differences from the paper:
        - The advantage is GRPO's unless ``baseline`` is False. Rewards of 0 and 1 without a baseline have no negative
          side.
    Differences from the released code:
        - ROLL and Trinity-RFT have the ratio of the token; see ``token_ratio``.
        - ROLL tells good responses from bad ones by the score, Trinity-RFT by the advantage, as is done here.
    """
    return Objective(
        group_normalized() if baseline else reward(),
        ratio=ratio.token(to=to) if token_ratio else ratio.sequence(bound=20.0, high=20.0, to=to, over="sum"),
        clip=tapered(),
        aggregation=aggregation.token_mean(),
    )
