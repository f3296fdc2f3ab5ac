"""FIPO: future-KL influenced policy optimization."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import scan, segment
from tokcredit.objective import Objective
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import flag, number
from tokcredit.stages.clip import Window
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.scale import Scale


@dataclass(frozen=True)
class future_kl(Scale):
    """``exp`` of the discounted sum of the log-ratios from the token to the end of its row, held within bounds.

    With ``x`` the log-ratio, held within 20 nats, and ``g = 2 ** (-1 / half_life)``::

        d[t] = x[t] if x[t] <= log(cap) else 0
        F[t] = d[t] + g * F[next token]
        w[t] = clip(exp(F[t]), 1 - width, 1 + width)             lower bound 1 with upward
        w[t] = clip(w[t], 0.8, 1)                                where A < 0 and x > log(safe)

    Args:
        half_life: Tokens after which a log-ratio counts half, above 0.
        width: Half of the range of the factor, at least 0; 0 for a factor of at most 10, without a lower bound.
        upward: Whether the factor is at least 1, if ``width`` is not 0.
        safe: Ratio from which on a token with a negative advantage is not blamed more, at least 1.
        cap: Log-ratios above ``log(cap)`` do not count; at least 1, or None to count all.
        drop_rows: Whether a row with more than one token with ``A < 0`` and a ratio above ``cap`` has factor 0.
    """

    half_life: float = number(128.0, above=0)
    width: float = number(0.2, at_least=0)
    upward: bool = flag(True)
    safe: float = number(4.0, at_least=1)
    cap: float | None = number(10.0, at_least=1, optional=True)
    drop_rows: bool = flag(False)

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        # No log-ratio of a token with another advantage is above its own.
        safe = torch.full_like(advantages, math.inf).masked_fill_(advantages < 0, math.log(self.safe))
        x = log_ratio.clamp(-20.0, 20.0)
        far = log_ratio > (math.inf if self.cap is None else math.log(self.cap))
        future = scan.returns(x.masked_fill(far, 0), spans, 2 ** (-1 / self.half_life))
        low, high = (1.0 if self.upward else 1 - self.width, 1 + self.width) if self.width else (0.0, 10.0)
        factor = future.exp_().clamp_(low, high)
        factor = torch.where(x > per_token(safe, spans), factor.clamp(0.8, 1.0), factor)
        if self.drop_rows:
            counted = segment.sum((far & (per_token(advantages, spans) < 0)).to(x.dtype), spans)
            factor = factor * ops.spread((counted <= 1).to(factor.dtype), spans)
        return factor


def fipo(
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    half_life: float = 128.0,
    width: float = 0.2,
    upward: bool = True,
    safe: float = 4.0,
    cap: float | None = 10.0,
    drop_rows: bool = False,
) -> Objective:
    """FIPO: DAPO whose advantage of a token grows if this update makes the rest of its response more probable.

    With ``A`` the advantage of GRPO, ``x`` the log-ratio, ``q = exp(x)`` and ``g = 2 ** (-1 / half_life)``::

        F[t] = sum over k >= t of g^(k - t) * (x[k] if q[k] <= cap else 0)
        w[t] = clip(exp(F[t]), 1 if upward else 1 - width, 1 + width)
        w[t] = clip(w[t], 0.8, 1)    if A < 0 and q[t] > safe
        loss = mean over all tokens of DAPO's loss with A * w[t], with a dual clip of cap

    On policy ``w`` is 1, so that the first update of a batch is DAPO's.

    Args:
        clip_low: Lower clip range.
        clip_high: Upper clip range.
        half_life: Tokens after which a log-ratio counts half. The authors' script for 32B has 32.
        width: Half of the range of ``w``; 0 for a factor of at most 10, without a lower bound.
        upward: Whether ``w`` is at least 1, if ``width`` is not 0.
        safe: Ratio from which on a token with ``A < 0`` is not blamed more. The authors' script for 32B has 10.
        cap: Dual-clip constant, at least 1; log-ratios above its logarithm do not count in ``F``. None for no cap.
        drop_rows: Whether rows with more than one token at the dual clip do not train, as in the released code.

    Cost: GRPO plus one scan per evaluation of the loss.
    References: arXiv 2603.19835.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - Tokens that the policy did not choose are skipped: they do not discount what follows them.
        - The rows of ``drop_rows`` stay in the denominators.
        - ``future_kl_start``, ``_window`` and ``_average`` of the authors' script are read nowhere, and not offered.
    """
    return Objective(
        clip=clip.ppo(clip_low, clip_high, cap),
        scales=(future_kl(half_life, width, upward, safe, cap, drop_rows),),
        aggregation=aggregation.token_mean(),
    )
