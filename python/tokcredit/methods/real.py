"""REAL: rewards as labels of a classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip, ratio
from tokcredit.stages.aggregation import Aggregation, Counts
from tokcredit.stages.base import number
from tokcredit.stages.clip import Window
from tokcredit.stages.credit import Credit, outcome
from tokcredit.stages.scale import Scale


@dataclass(frozen=True)
class labels(Credit):
    """1 where the reward is above the mean of the group, else -1; 0 in groups that have one of the two only."""

    def __call__(self, batch: Rollouts) -> Tensor:
        label = outcome(batch).sign_().sub_(0.5).sign_().to(batch.rewards.dtype)  # -1 at the mean too
        groups = batch.nonempty_groups
        both = segment.maximum(label, groups) > segment.minimum(label, groups)
        return label.masked_fill_(~(batch.nonempty & groups.per_row(both)), 0)[:, None]


@dataclass(frozen=True)
class misclassified(Scale):
    """How wrongly each row is classified by its mean log-ratio, from 0 to ``1 / tau``.

    With ``s`` the mean log-ratio of a row, and ``z = -s / tau`` where its advantage is above 0, ``s / tau`` below::

        exp(z) / (1 + sum of exp(z) over the rows of the group whose advantage has the same sign) / tau

    Rows with an advantage of 0 do not count. Of advantages that vary inside of a row the mean is taken.

    Args:
        tau: Temperature, above 0.
    """

    tau: float = number(0.5, above=0, scheduled=True)
    reads_rollouts: ClassVar[bool] = True
    couples_rows: ClassVar[bool] = True
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
        assert signal is not None
        label = advantages[:, 0] if advantages.dim() == 2 else segment.mean(advantages, spans)
        score = (log_ratio[:, 0] if log_ratio.dim() == 2 else segment.mean(log_ratio, spans)) / self.tau
        z = torch.where(label > 0, -score, score)
        counts = (label != 0) & (segment.count(spans) > 0)
        side = segment.Ids(signal[:, 0] * 2 + (label > 0), 2 * len(signal), counts)
        total = segment.logsumexp(z, side).index_select(0, side.ids)
        return ((z - functional.softplus(total)).exp() / self.tau)[:, None]


@dataclass(frozen=True)
class group_mean(Aggregation):
    """Mean over groups of the sum over the group's rows of the mean over the row's tokens.

    Groups and rows without a training token do not count.
    """

    counts: ClassVar[frozenset[str]] = frozenset({"groups"})

    @property
    def for_terms(self) -> Aggregation:
        """Mean over all training tokens."""
        return aggregation.token_mean()

    def __call__(self, counts: Counts) -> Tensor:
        return (counts.dp_size / (counts.lengths.clamp(min=1) * counts.groups.clamp(min=1)).double())[:, None]


def real(tau: float = 0.5) -> Objective:
    """REAL: rewards label the responses of a group as good or bad, and the policy learns to tell them apart.

    Responses with a reward above the mean of the group should have a positive mean log-ratio, the others a negative
    one. With ``s[i] = mean over t of (log p - log p_old)``, and sums over the good and the bad responses of a group::

        loss = mean over groups of log(1 + sum of exp(-s[i] / tau)) + log(1 + sum of exp(s[i] / tau))
                                               good                               bad

    The gradient of a response is at most ``1 / tau``, and there are no bounds. It depends on the current policy at all
    responses of the group, so parts of a batch must have whole groups.

    Args:
        tau: Temperature, above 0.

    Cost: The same as GRPO. Micro-batches hold whole groups.
    References: arXiv 2602.05630.
    Differences from the paper:
        - The value of the loss is that of the score function; its gradient is the paper's.
    Differences from the released code:
        - The mean is over the groups of the whole batch with a training token, also those whose responses are all good
          or all bad and have no gradient. The release takes the groups of the micro-batch.
        - There is no KL term; add ``term.kl(0.04)``, whose mean is over tokens.
    """
    return Objective(
        labels(),
        ratio=ratio.sequence(high=float("inf")),
        clip=clip.gated("ratio", 0.0, 0.0, outside_low=1.0, outside_high=1.0, both_sides=True),
        scales=(misclassified(tau),),
        aggregation=group_mean(),
    )
