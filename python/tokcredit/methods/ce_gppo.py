"""CE-GPPO: clipped tokens keep a bounded gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit.objective import Objective
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import number
from tokcredit.stages.clip import Window, log_bound
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.scale import Scale


@dataclass(frozen=True)
class stopped_above(Scale):
    """0 where the advantage is negative and the ratio exceeds a bound, else 1: the dual clip.

    Args:
        bound: Largest ratio, at least 1.
    """

    bound: float = number(at_least=1, scheduled=True)

    couples_tokens = False

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        most = torch.full_like(advantages, math.inf).masked_fill_(advantages < 0, math.log(self.bound))
        return (log_ratio > per_token(most, spans)).logical_not_().to(log_ratio.dtype)


def ce_gppo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    share_low: float = 0.75,
    share_high: float = 1.0,
    cap: float | None = 10.0,
) -> Objective:
    """CE-GPPO: a token that PPO's clip would stop keeps a share of the gradient that it has at the bound.

    With ``A`` the advantage of GRPO, ``q`` the ratio and ``sg`` the stop-gradient::

        weight = share_low * (1 - clip_low)      if A < 0 and q < 1 - clip_low
                 share_high * (1 + clip_high)    if A > 0 and q > 1 + clip_high
                 0                               if A < 0 and q > cap
                 q                               otherwise
        loss = mean over all tokens of -A * sg(weight) * log p

    Shares of 0 give PPO's gradient, shares of 1 that of GPPO.

    Args:
        clip_low: Lower clip range, at least 0.
        clip_high: Upper clip range, at least 0.
        share_low: Share of the gradient that is left below the lower bound, the paper's beta 1; at least 0. The paper
            takes 0.75 for 7B and 0.5 for 1.5B.
        share_high: Share of the gradient that is left above the upper bound, the paper's beta 2; at least 0.
        cap: Dual-clip constant, at least 1: a token with ``A < 0`` and a larger ratio has no gradient. None for no dual
            clip.

    Cost: The same as GRPO.
    References: CE-GPPO, arXiv 2509.20712. GPPO, arXiv 2508.07629.
    Differences from the paper:
        - The value of the loss is that of the score function; its gradient is the paper's.
    Differences from the released code:
        - The default of the release's function for ``share_low`` is 0.25; its scripts and its text have 0.75.
    """
    gate = clip.gated("ratio", log_bound(1 - clip_low), math.log1p(clip_high), share_low, share_high)
    return Objective(
        clip=gate,
        scales=() if cap is None else (stopped_above(cap),),
        aggregation=aggregation.token_mean(),
    )
