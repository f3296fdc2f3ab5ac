"""Conditional advantage estimation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment, select
from tokcredit.blocks.segment import Ids
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import Adjustable
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import Stage, flag, number, part
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.group import counted


class Metric(Stage):
    """Base of the numbers by which CANON splits a group."""

    def __call__(self, batch: Rollouts) -> Tensor:
        """Return the number of each row, float ``[R]``.

        Args:
            batch: The rollouts.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class mean_entropy(Metric):
    """Mean entropy of the next-token distributions of the row, nats."""

    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, batch: Rollouts) -> Tensor:
        return segment.mean(batch.input("entropies"), batch.spans)


@dataclass(frozen=True)
class length(Metric):
    """Number of tokens of the row that the policy chose."""

    def __call__(self, batch: Rollouts) -> Tensor:
        return batch.lengths.double()


@dataclass(frozen=True)
class order(Metric):
    """Place of the row in the batch, the paper's control: a split that has no meaning."""

    def __call__(self, batch: Rollouts) -> Tensor:
        return torch.arange(batch.num_rows, dtype=torch.float64, device=batch.device)


@dataclass(frozen=True)
class by_mean_reward(Stage):
    """Weight that depends linearly on the mean reward of the batch, for rewards from 0 to 1.

    Args:
        failed: Weight where the mean reward is 0.
        solved: Weight where the mean reward is 1.
    """

    failed: float = number(1.0)
    solved: float = number(0.0)
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        mean = (batch.rewards.double() * batch.nonempty).sum() / batch.nonempty.sum()
        return self.failed + (self.solved - self.failed) * mean


@dataclass(frozen=True)
class conditional(Credit):
    """CANON's advantage: the reward against the mean of the other half of the group, mixed with that of its own half.

    Rows of a group are sorted by the metric, equal ones in the order of the batch. The low half are the first
    ``floor(n / 2)`` of ``n`` rows, the high half the others. A half without rows has mean 0. With ``own = high`` and
    ``other = low`` for a row of the high half, and the reverse for a row of the low half::

        inter = own * r - other * mean(other half) + (offset in the high half, -offset in the low half)
        intra = r - mean(own half)
        A = between * inter + (1 - between) * intra

    In a group of one ``intra = r``.

    Args:
        metric: Number by which the group is split.
        between: Weight of ``inter``, the paper's mu; may be a schedule, a controller or :class:`by_mean_reward`.
        high: Factor of the rewards of the high half in ``inter``.
        low: Factor of the rewards of the low half in ``inter``.
        offset: Added to ``inter`` in the high half and subtracted in the low half.
        count_empty: Whether rows without a token that the policy chose count in the group.
    """

    metric: Metric = part(Metric, mean_entropy)
    between: float | by_mean_reward = number(1.0, scheduled=True, or_stage=by_mean_reward)
    high: float = number(1.0)
    low: float = number(1.0)
    offset: float = number(0.0)
    count_empty: bool = flag(False)

    def __call__(self, batch: Rollouts) -> Tensor:
        groups, r = counted(batch, self.count_empty), batch.rewards.double()
        is_low = select.top_k(-self.metric(batch), groups.counts // 2, groups.rows, Ids(groups.scope, groups.count))
        half = groups.scope * 2 + is_low  # negative for rows that do not count
        means = segment.mean(r, Ids(half, 2 * groups.count))
        half = groups.index * 2 + is_low
        mean_of_own, mean_of_other = means.index_select(0, half), means.index_select(0, half ^ 1)

        def by_half(low: float, high: float) -> Tensor | float:
            return high if low == high else torch.full_like(r, high).masked_fill_(is_low, low)

        between = self.between(batch) if isinstance(self.between, by_mean_reward) else self.between
        inter = by_half(self.low, self.high) * r - by_half(self.high, self.low) * mean_of_other
        if self.offset:
            inter += by_half(-self.offset, self.offset)
        intra = r - mean_of_own.masked_fill_(groups.per_row(groups.counts < 2), 0)
        return (between * inter + (1 - between) * intra).to(batch.rewards.dtype)[:, None]


def canon(
    by_length: bool = False,
    between: float | Adjustable | by_mean_reward | None = None,
    alpha: float = 1.0,
    offset: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    max_length: int | None = None,
    cap: float | None = None,
) -> Objective:
    """CANON: the group is split by entropy, and a reward is compared with the mean of the other or of its own half.

    The rows of each half are averaged::

        A = between * (r - mean of the other half) + (1 - between) * (r - mean of the own half)

    There is no standard deviation; ``between=0.5`` with equal halves is :func:`dr_grpo`. The comparison with the other
    half favours the half with the higher rewards, that with the own half the correct responses of the weaker half.

    Args:
        by_length: Whether the group is split by the number of tokens instead of the mean entropy.
        between: Weight of the comparison with the other half, the paper's mu. 1 is CANON-Inter, 0 is CANON-Intra, and
            None is CANON-Dynamic, one minus the mean reward of the batch, for rewards from 0 to 1. The cosine schedules
            of the release are ``tokcredit.schedule.cosine_restarts(0, 1, 0.4, steps=150, warmup=30, period=40)`` for
            first inter and later intra, and ``(1, 0.4, 1, ...)`` for the reverse.
        alpha: Factor of the rewards of long responses, or of low-entropy responses, in the comparison with the other
            half. Below 1 with ``by_length=True, between=1`` it is CANON-Eff.
        offset: Added in the high half and subtracted in the low half, in the comparison with the other half.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        max_length: Constant that divides the sum over the tokens of a response, at least 1; None takes the longest row
            of the batch.
        cap: Dual-clip constant, at least 1: where ``A < 0`` the loss is at most ``-A * cap``. None for no dual clip.

    Cost: GRPO plus the entropies of the forward pass for the old log-probs.
    References: arXiv 2509.23962.
    Differences from the paper:
        - ``offset`` is in the released code only.
        - The half that ``alpha`` multiplies follows the released code: long responses, or low-entropy ones.
    Differences from the released code:
        - CANON-Dynamic is that of the paper. The released function has the reverse, the mean reward itself:
          ``between=by_mean_reward(0, 1)``.
        - There is no dual clip; the scripts of the release have ``cap=3.0``.
        - Rows without a token that the policy chose do not count in the group.
    """
    return Objective(
        conditional(
            length() if by_length else mean_entropy(),
            by_mean_reward() if between is None else between,
            high=alpha if by_length else 1.0,
            low=1.0 if by_length else alpha,
            offset=offset,
        ),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.sequence_sum(max_length),
    )
