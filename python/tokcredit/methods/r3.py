"""R3: replay, reflection and ranking rewards."""

from __future__ import annotations


from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment, select
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import clip
from tokcredit.stages.base import Stage, number, parts, whole_number
from tokcredit.stages.credit import Credit, outcome
from tokcredit.stages.credit.group import deviation


class Bonus(Stage):
    """A number per row that is added to its reward."""

    def __call__(self, batch: Rollouts) -> Tensor:
        """Return the bonus of each row, float ``[R]``.

        Args:
            batch: The rollouts.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class brevity(Bonus):
    """``max(0, 1 - L / limit)`` for a row of L tokens whose reward exceeds the threshold, 0 for others."""

    limit: int = whole_number(32768, at_least=1)
    threshold: float = number(0.5)

    def __call__(self, batch: Rollouts) -> Tensor:
        short = (1 - batch.lengths.to(batch.rewards.dtype) / self.limit).clamp(min=0)
        return torch.where(batch.rewards > self.threshold, short, 0)


@dataclass(frozen=True)
class dominance(Bonus):
    """From ``best`` down to 0 for the truncated rows of groups without a correct row, by the shape of their entropy.

    With L tokens, ``peak`` is the mean of the ``max(1, floor(share L))`` largest entropies of a row and ``mean`` that
    of all. A row dominates the truncated rows of its group with a smaller peak and a larger mean. Among N of them the
    one that dominates most has rank 0, equals share the mean of their ranks, and rank k gets
    ``best (1 - k / (N - 1))``. A single one gets ``best`` if the group has a finished row too, else 0.

    Replayed rows neither get anything nor make their group one with a correct row. Empty rows are left out.
    """

    share: float = number(0.2, at_least=0, at_most=1)
    best: float = number(0.5)
    threshold: float = number(0.5)
    reads: ClassVar[frozenset[str]] = frozenset({"entropies", "replayed", "truncated"})

    def __call__(self, batch: Rollouts) -> Tensor:
        groups = batch.groups
        fresh, truncated = ~batch.input("replayed"), batch.input("truncated")
        solved = groups.per_row(segment.maximum(batch.rewards, groups.counting(fresh)) > self.threshold)
        failed = fresh & ~solved & (batch.lengths > 0)
        rows = (failed & truncated).nonzero()[:, 0]
        n = torch.bincount(groups.index[rows], minlength=groups.count)
        out = torch.zeros_like(batch.rewards)
        if rows.numel():
            rows = rows[groups.index[rows].argsort(stable=True)]
            peak, mean = self._entropies(batch, rows)
            several = groups.per_row(segment.count(groups.counting(failed)))[rows] > 1
            k = _ranks(peak, mean, n)
            out[rows] = ((1 - k / (n[groups.index[rows]] - 1).clamp(min=1)) * self.best * several).to(out.dtype)
        return out

    def _entropies(self, batch: Rollouts, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the largest and of all entropies of these rows; ``[M]`` each."""
        entropies = batch.input("entropies")
        by_place = rows.argsort()
        chosen = rows[by_place]
        largest = (self.share * batch.lengths[chosen].double()).floor().clamp(min=1).long()
        all_of = Spans.trusted(batch.begin[chosen], batch.end[chosen], batch.num_tokens, batch.response_mask)
        top = all_of.with_mask(select.top_k(entropies, largest, all_of))
        back = by_place.argsort()
        return segment.mean(entropies, top)[back], segment.mean(entropies, all_of)[back]


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
class pooled(Credit):
    """Rewards with bonuses, centred and scaled over the fresh and the replayed rows of a group together.

    ``A = (R - mean) / (scale std + epsilon)`` where the group has replayed rows, and with scale 1 where it has none;
    R is the reward plus the bonuses and ``std`` the sample standard deviation. A group of one has mean 0 and std 1.

    Replayed rows come from an older policy, so the batch must say with which ``old_log_probs`` they were drawn.
    """

    bonuses: tuple[Bonus, ...] = parts(Bonus)
    scale: float = number(1.0, at_least=0)
    epsilon: float = number(1e-6, at_least=0)
    reads: ClassVar[frozenset[str]] = frozenset({"old_log_probs", "replayed"})

    def __call__(self, batch: Rollouts) -> Tensor:
        rewards = batch.rewards
        for bonus in self.bonuses:
            rewards = rewards + bonus(batch)
        shaped, groups = replace(batch, rewards=rewards), batch.groups
        joined = segment.count(groups.counting(batch.input("replayed"))) > 0
        scale = groups.per_row(torch.where(joined, self.scale, 1.0))
        return (outcome(shaped) / (scale * deviation(shaped, 0.0) + self.epsilon)).to(rewards.dtype)[:, None]


def r3(
    alpha: float = 1.0,
    share: float = 0.2,
    best: float = 0.5,
    max_length: int = 32768,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO whose groups all right or all wrong are joined by stored replies of the other kind.

    ``A = (R - mean) / (alpha std + epsilon)`` over fresh and replayed rows; the ratio of a replayed row is to the
    policy it was drawn from. R is the reward, ``+ max(0, 1 - L / max_length)`` for a correct row of L tokens, and in
    groups whose fresh rows are all wrong up to ``best`` for those cut at the greatest length, ranked: a row dominates
    another if its largest entropies are larger and its mean entropy smaller. The trainer replays, and asks hard prompts
    again with a wrong reply and a request to reflect (``tokcredit.train.replay``).

    Args:
        alpha: of the standard deviation where rows were replayed; above 1 such groups are paid less.
        share: of a row's tokens whose entropies, the largest, are compared.
        best: reward of the first of the ranked rows; below 1, or it outdoes a correct one.
        max_length: a correct row of this length gets no bonus.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: the paper's lambda.

    Cost: as GRPO with entropies from the old log-probs; replayed rows need passes but no sampling, hard prompts another
    group. Two entropy means per row, and comparisons inside groups.
    Source: arXiv 2601.19620.
    Departs from the paper: no KL term; token ratios for its sequence ratio. Its numbers were not found: alpha, share,
    best and epsilon are ours. It leaves open, and this takes, log-probs at sampling time for replayed rows, alpha 1 in
    groups without them, the mean rank for equals, and for a single truncated row ``best`` next to a finished one, else
    0. Ranking and length bonus act from the first epoch on, as they need no stored replies.
    """
    return Objective(
        pooled((brevity(max_length), dominance(share, best)), alpha, epsilon),
        clip=clip.ppo(clip_low, clip_high),
    )
