"""VESPO: a smooth weight of each row's importance ratio in place of clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.objective import Objective
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip, ratio
from tokcredit.stages.base import InputName, number
from tokcredit.stages.clip import Window
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.scale import Scale


@dataclass(frozen=True)
class gamma(Scale):
    """The weight ``W^k * exp(lam * (1 - W))`` of a ratio ``W``: 1 on policy, largest at ``W = k / lam``, 0 far away.

    Args:
        k_positive: Exponent where ``A >= 0``, at least 0.
        lam_positive: Rate where ``A >= 0``, at least 1e-4.
        k_negative: Exponent where ``A < 0``, at least 0.
        lam_negative: Rate where ``A < 0``, at least 1e-4.
    """

    k_positive: float = number(2.0, at_least=0, scheduled=True)
    lam_positive: float = number(3.0, at_least=1e-4, scheduled=True)
    k_negative: float = number(3.0, at_least=0, scheduled=True)
    lam_negative: float = number(2.0, at_least=1e-4, scheduled=True)

    couples_tokens = False
    takes_rows: ClassVar[bool] = True

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        z, negative = log_ratio.clamp(math.log(1e-8), 20.0), advantages < 0
        if z.dim() != negative.dim():
            z, negative = per_token(z, spans), per_token(negative, spans)
        moved = z.expm1()
        up = (self.k_positive * z).sub_(moved, alpha=self.lam_positive)
        down = (self.k_negative * z).sub_(moved, alpha=self.lam_negative)
        return torch.where(negative, down, up).exp_()


def vespo(
    k_positive: float = 2.0,
    lam_positive: float = 3.0,
    k_negative: float = 3.0,
    lam_negative: float = 2.0,
    to: InputName = "old_log_probs",
) -> Objective:
    """VESPO: the score-function gradient of each response is weighted by a smooth function of its importance ratio.

    With ``A`` the advantage of GRPO, ``sg`` the stop-gradient and ``k, lam`` chosen by the sign of ``A``::

        z[i] = sum over t of (log p - log p_to), held in [log 1e-8, 20]
        phi[i] = exp(lam + k * z[i] - lam * exp(z[i]))
        loss = mean over all tokens of -A * sg(phi[i]) * log p

    ``phi`` is 1 on policy. There are no bounds. Since ``z`` is a sum, ``phi`` is nearly 0 for long responses after a
    few steps away from the old policy.

    Args:
        k_positive: Exponent where ``A >= 0``.
        lam_positive: Rate where ``A >= 0``.
        k_negative: Exponent where ``A < 0``.
        lam_negative: Rate where ``A < 0``.
        to: Input with the log-probs that the ratio divides by. ``rollout_log_probs`` also corrects for an engine whose
            probabilities differ from the trainer's.

    Cost: The same as GRPO.
    References: arXiv 2602.10693.
    Differences from the released code:
        - The sign of the advantage is that of each token. The release takes that of the row's first token.
        - With ``to="rollout_log_probs"`` the ratio to the engine is one sum. The release adds the logarithms of clipped
          correction weights.
        - The mean is over the tokens of the whole batch; the release takes that of the micro-batch.
        - A log-prob that is NaN makes the gradient of its row NaN; the release sets the weight to 0.
    """
    return Objective(
        ratio=ratio.sequence(bound=20.0, high=20.0, to=to, over="sum"),
        clip=clip.gated("ratio", 0.0, 0.0, outside_low=1.0, outside_high=1.0, both_sides=True),
        scales=(gamma(k_positive, lam_positive, k_negative, lam_negative),),
        aggregation=aggregation.token_mean(),
    )
