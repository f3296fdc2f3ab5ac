"""LUFFY: learning to reason under off-policy guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation
from tokcredit.stages.base import flag, number
from tokcredit.stages.clip import Clip, Window
from tokcredit.stages.credit import Credit
from tokcredit.stages.scale import Scale


@dataclass(frozen=True)
class sampled_baseline(Credit):
    """Reward minus the mean reward of the rows of the group that the policy sampled, expert rows left out.

    A group without a sampled row has mean 0.

    Args:
        scale: Whether to divide by the sample standard deviation of these rows, or by 1 where it is 0 or there is one.
    """

    scale: bool = flag(False)
    reads: ClassVar[frozenset[str]] = frozenset({"expert"})

    def __call__(self, batch: Rollouts) -> Tensor:
        sampled = batch.groups.counting(batch.nonempty & ~batch.input("expert"))
        rewards = batch.rewards.double()
        advantages = rewards - sampled.per_row(segment.mean(rewards, sampled))
        if self.scale:
            std = torch.where(sampled.counts > 1, segment.var(rewards, sampled), 0).sqrt()
            advantages = advantages / sampled.per_row(torch.where(std > 0, std, 1))
        return advantages.masked_fill_(~batch.nonempty, 0)[:, None].to(batch.rewards.dtype)


@dataclass(frozen=True)
class ratio_of_samples(Clip):
    """No bounds; the weight is the ratio in sampled rows and 1 in expert rows.

    Old log-probs of expert rows have no effect, but must be there and finite.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"expert"})
    has_bounds: ClassVar[bool] = False

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        expert = batch.input("expert")[:, None]
        low = torch.full(expert.shape, -math.inf, dtype=advantages.dtype, device=batch.device).masked_fill_(expert, 0)
        gate = {"on": "ratio", "outside_low": 1.0, "outside_high": 1.0, "both_sides": True}
        return Window("gated", low, -low, gate=gate)


@dataclass(frozen=True)
class shaped(Scale):
    """``g p / (p + g)^2`` in expert rows, largest at ``p = g``; 1 in sampled rows.

    It is the derivative of ``p / (p + g)`` with respect to ``log p``.

    Args:
        shift: ``g``, above 0.
    """

    shift: float = number(0.1, above=0)
    reads: ClassVar[frozenset[str]] = frozenset({"expert"})

    couples_tokens = False

    def signal(self, batch: Rollouts, window: Window) -> Tensor | None:
        """Return 1 for the expert's rows and 0 for the others, float64 ``[R, 1]``.

        Args:
            batch: The rollouts.
            window: Window of the clip stage.
        """
        return batch.input("expert")[:, None].double()

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        assert signal is not None
        share = torch.sigmoid(log_probs.to(log_ratio.dtype) - math.log(self.shift))
        expert = signal[:, 0]
        return ops.row_affine(share.addcmul_(share, share, value=-1), expert, 1 - expert, spans)


def luffy(shift: float = 0.1, scale: bool = False, max_length: int | None = None) -> Objective:
    """LUFFY: GRPO on sampled responses and, in the same groups, on responses of an expert with a shaped probability.

    Mean and standard deviation are those of the sampled responses of the group. With ``q`` the ratio::

        A[i] = r[i] - mean(r of sampled responses)
        loss = mean over i of (sum over t of -A * q) / max_length                        sampled responses
                              (sum over t of -A * p / (p + shift)) / max_length          responses of the expert

    An expert's token that the policy finds improbable still trains: the derivative of ``p / (p + shift)`` with respect
    to ``log p`` is largest where ``p = shift``. Nothing is clipped.

    Args:
        shift: The paper's gamma, above 0.
        scale: Whether to divide by the standard deviation of the sampled responses.
        max_length: Constant that replaces the length of the response, at least 1; the authors take 8192. None takes the
            longest row.

    Cost: The same as GRPO. The caller adds the expert's responses and marks them by the input ``expert``. Their old
        log-probs have no effect, but must be finite.
    References: arXiv 2504.14945.
    Differences from the paper:
        - The value of the loss at an expert's token is that of the score function; its gradient is the paper's.
    Differences from the released code:
        - The loss is the mean over rows; the release has their sum.
        - The release adds an entropy bonus with a coefficient of 0.001; add ``term.entropy(0.001)``.
        - Other shapes of the probability are not offered.
    """
    return Objective(
        sampled_baseline(scale),
        clip=ratio_of_samples(),
        scales=(shaped(shift),),
        aggregation=aggregation.sequence_sum(max_length),
    )
