"""Geometric-mean policy optimization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import input_name, number
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.ratio import LogRatio, Ratio


@dataclass(frozen=True)
class clipped_mean(Ratio):
    """The geometric mean of the row's ratios, each first clipped on the side that its advantage pushes it to.

    ``log q = mean_t(min(x[t], high) if A[t] > 0 else max(x[t], -low) if A[t] < 0 else x[t])``, with ``x`` the
    difference of the log-probs. ``log q`` is at most 10.

    Args:
        low: Lower bound of a log-ratio is ``-low``, nats, at least 0.
        high: Upper bound of a log-ratio, nats, at least 0.
        to: Input with the log-probs that the ratio divides by.
    """

    low: float = number(0.4, at_least=0, scheduled=True)
    high: float = number(0.4, at_least=0, scheduled=True)
    to: str = input_name("old_log_probs")
    couples_tokens: ClassVar[bool] = True

    def __call__(self, spans: Spans, log_probs: Tensor, reference: Tensor, advantages: Tensor) -> LogRatio:
        difference = (log_probs.float() if log_probs.dtype.itemsize < 4 else log_probs) - reference
        low = torch.full_like(advantages, -math.inf).masked_fill_(advantages < 0, -self.low)
        high = torch.full_like(advantages, math.inf).masked_fill_(advantages > 0, self.high)
        held = difference.clamp_(per_token(low, spans), per_token(high, spans))
        return LogRatio(segment.mean(held, spans)[:, None], reference, (-math.inf, 10.0))


def gmpo(low: float = 0.4, high: float = 0.4) -> Objective:
    """GMPO: GRPO with one weight per response, the geometric mean of its clipped token ratios.

    With ``A`` the advantage of GRPO, ``x = log p - log p_old`` and ``sg`` the stop-gradient::

        y[t] = min(x[t], high) if A > 0 else max(x[t], -low)
        q[i] = exp(mean over t of y[t])
        loss = mean over i, then over t not clipped, of -A[i] * sg(q[i]) * log p[t]

    A clipped token counts with its bound in the mean and has no gradient itself. A token that is not clipped has the
    gradient of ``-A[i] * q[i]``, the paper's loss, times the length of the response, which the mean over tokens divides
    by again.

    Args:
        low: The log-ratio of a token with a negative advantage is at least ``-low``, nats.
        high: The log-ratio of a token with a positive advantage is at most ``high``, nats.

    Cost: The same as GRPO.
    References: arXiv 2507.20673.
    Differences from the paper:
        - The value of the loss is that of the score function; its gradient is the paper's.
        - The logarithm of the weight is at most 10.
        - Advantages that differ between the tokens of a row, which the paper does not have, are clipped by their own
          sign and multiply their own token.
    Differences from the released code:
        - Rows without a token that the policy chose do not count. verl and TRL count them in the mean.
        - The mean is over the rows of the whole batch; verl takes that of the micro-batch.
        - verl multiplies a row by the geometric mean of its correction weights and takes the mean of its advantages.
          Here each token has its own; ``token_weights.importance("mean")`` has one weight per row.
    """
    gate = clip.gated("difference", 0.0 - low, high)
    return Objective(ratio=clipped_mean(low, high), clip=gate, aggregation=aggregation.sequence_mean())
