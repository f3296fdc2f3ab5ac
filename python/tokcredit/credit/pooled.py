"""Credit of groups whose fresh rows are joined by replayed ones, and bonuses that tell their rows apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import segment, select
from tokcredit.choice import Choice
from tokcredit.credit.group import outcome, spread
from tokcredit.credit.halves import Metric
from tokcredit.ops import Rows
from tokcredit.rollouts import Rollouts
from tokcredit.segment import Ids


@dataclass(frozen=True)
class brevity(Choice):
    """``max(0, 1 - L / limit)`` for a row of L tokens whose reward exceeds the threshold, 0 for others."""

    limit: int = 32768
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")

    def __call__(self, batch: Rollouts) -> Tensor:
        short = (1 - batch.lengths.to(batch.rewards.dtype) / self.limit).clamp(min=0)
        return torch.where(batch.rewards > self.threshold, short, 0)


@dataclass(frozen=True)
class dominance(Choice):
    """From ``best`` down to 0 for the truncated rows of groups without a correct row, by the shape of their entropy.

    With L tokens, ``peak`` is the mean of the ``max(1, floor(share L))`` largest entropies of a row and ``mean`` that
    of all. A row dominates the truncated rows of its group with a smaller peak and a larger mean. Among N of them the
    one that dominates most has rank 0, equals share the mean of their ranks, and rank k gets
    ``best (1 - k / (N - 1))``. A single one gets ``best`` if the group has a finished row too, else 0.

    Replayed rows neither get anything nor make their group one with a correct row. Empty rows are left out.
    """

    share: float = 0.2
    best: float = 0.5
    threshold: float = 0.5
    reads: ClassVar[frozenset[str]] = frozenset({"entropies", "replayed", "truncated"})

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected a number from 0 to 1, got {self.share}")

    def __call__(self, batch: Rollouts) -> Tensor:
        index, count = batch.group_index, batch.num_groups
        fresh, truncated = ~batch.evidence("replayed"), batch.evidence("truncated")
        solved = segment.maximum(batch.rewards, Ids(index, count, fresh)) > self.threshold
        failed = fresh & ~solved[index] & (batch.lengths > 0)
        rows = (failed & truncated).nonzero()[:, 0]
        n = torch.bincount(index[rows], minlength=count)
        out = torch.zeros_like(batch.rewards)
        if rows.numel():
            by_group = index[rows].argsort(stable=True)
            peak, mean = (x[by_group] for x in self._entropies(batch, rows))
            rows = rows[by_group]
            paid = (torch.bincount(index[failed], minlength=count) > 1)[index[rows]]
            k = _ranks(peak, mean, n)
            out[rows] = ((1 - k / (n[index[rows]] - 1).clamp(min=1)) * self.best * paid).to(out.dtype)
        return out

    def _entropies(self, batch: Rollouts, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the largest and of all entropies of these rows, which rise; ``[M]`` each."""
        entropies = batch.evidence("entropies")
        largest = (self.share * batch.lengths[rows].double()).floor().clamp(min=1).long()
        all_of = Rows(batch.begin[rows], batch.end[rows], batch.response_mask)
        top = all_of._replace(mask=select.top_k(entropies, largest, all_of))
        return segment.mean(entropies, top), segment.mean(entropies, all_of)


def _ranks(peak: Tensor, mean: Tensor, n: Tensor) -> Tensor:
    """Rank of each element by how many of its scope it dominates; elements lie scope after scope, ``n`` in each."""
    inside = torch.arange(int(n.max()), device=n.device) < n[:, None]
    # NaN compares as False: what pads a scope neither dominates nor is dominated.
    x, y = (torch.full(inside.shape, torch.nan, dtype=v.dtype, device=v.device) for v in (peak, mean))
    x[inside], y[inside] = peak, mean
    beaten = ((x[:, :, None] > x[:, None]) & (y[:, :, None] < y[:, None])).sum(2).masked_fill(~inside, -1)
    above = (beaten[:, None] > beaten[:, :, None]).sum(2)
    equal = (beaten[:, None] == beaten[:, :, None]).sum(2)
    return (above + (equal - 1).double() / 2)[inside]


@dataclass(frozen=True)
class pooled(Choice):
    """Rewards with bonuses, centred and scaled over the fresh and the replayed rows of a group together.

    ``A = (R - mean) / (scale std + epsilon)`` where the group has replayed rows, and with scale 1 where it has none;
    R is the reward plus the bonuses and ``std`` the sample standard deviation. A group of one has mean 0 and std 1.

    Replayed rows come from an older policy, so the batch must say with which ``old_log_probs`` they were drawn.
    """

    bonuses: tuple[Metric, ...] = ()
    scale: float = 1.0
    epsilon: float = 1e-6
    reads: ClassVar[frozenset[str]] = frozenset({"old_log_probs", "replayed"})

    def __call__(self, batch: Rollouts) -> Tensor:
        rewards = batch.rewards
        for bonus in self.bonuses:
            rewards = rewards + bonus(batch)
        shaped = replace(batch, rewards=rewards)
        replayed = torch.bincount(batch.group_index[batch.evidence("replayed")], minlength=batch.num_groups) > 0
        scale = torch.where(replayed[batch.group_index], self.scale, 1.0)
        return (outcome(shaped) / (scale * spread(shaped, 0.0) + self.epsilon)).to(rewards.dtype)[:, None]
