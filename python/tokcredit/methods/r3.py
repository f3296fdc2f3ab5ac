"""R^3: replay, reflection and ranking rewards."""

from __future__ import annotations

from dataclasses import dataclass
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
from tokcredit.stages.credit.group import deviation, standardized


class Bonus(Stage):
    """Base of numbers that are added to the rewards of rows."""

    def __call__(self, batch: Rollouts) -> Tensor:
        """Return the bonus of each row, float ``[R]``.

        Args:
            batch: The rollouts.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class length_reward(Bonus):
    """``max(0, 1 - L / limit)`` for a row of ``L`` tokens whose reward exceeds the threshold, 0 for the others.

    Args:
        limit: Number of tokens from which on there is no bonus, at least 1.
        threshold: A row is correct if its reward exceeds it.
    """

    limit: int = whole_number(32768, at_least=1)
    threshold: float = number(0.5)

    def __call__(self, batch: Rollouts) -> Tensor:
        short = (1 - batch.lengths.to(batch.rewards.dtype) / self.limit).clamp(min=0)
        return torch.where(batch.rewards > self.threshold, short, 0)


@dataclass(frozen=True)
class dominance(Bonus):
    """R^3's entropy ranking: from ``best`` down to 0 for the truncated rows of groups without a correct row.

    With ``L`` tokens, ``peak`` is the mean of the ``max(1, floor(share * L))`` largest entropies of a row, and ``mean``
    that of all. A row dominates those truncated rows of its group that have a smaller ``peak`` and a larger ``mean``.
    The ``N`` truncated rows of a group are ranked by how many rows they dominate; rows with equal numbers have the mean
    of their ranks::

        bonus = best * (1 - rank / (N - 1))        # rank from 0 to N - 1

    A single truncated row gets ``best`` if its group has another fresh row, else 0. Replayed rows get nothing and do
    not make their group one with a correct row. Rows without a token that the policy chose are left out.

    Args:
        share: Share of the largest entropies in ``peak``, from 0 to 1; the paper's p.
        best: Bonus of the first row; the paper's R_max.
        threshold: A row is correct if its reward exceeds it.
    """

    share: float = number(0.2, at_least=0, at_most=1)
    best: float = number(0.5)
    threshold: float = number(0.5)
    reads: ClassVar[frozenset[str]] = frozenset({"entropies", "replayed", "truncated"})

    def __call__(self, batch: Rollouts) -> Tensor:
        groups = batch.groups
        fresh, truncated = ~batch.input("replayed"), batch.input("truncated")
        solved = groups.per_row(segment.maximum(batch.rewards, groups.counting(fresh)) > self.threshold)
        failed = fresh & ~solved & batch.nonempty
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
        """Return the mean of the largest and that of all entropies of these rows, ``[M]`` each."""
        entropies = batch.input("entropies")
        by_place = rows.argsort()
        chosen = rows[by_place]
        largest = (self.share * batch.lengths[chosen].double()).floor().clamp(min=1).long()
        all_of = Spans.trusted(batch.begin[chosen], batch.end[chosen], batch.num_tokens, batch.response_mask)
        top = all_of.with_mask(select.top_k(entropies, largest, all_of))
        back = by_place.argsort()
        return segment.mean(entropies, top)[back], segment.mean(entropies, all_of)[back]


def _ranks(peak: Tensor, mean: Tensor, n: Tensor) -> Tensor:
    """Return the rank of each element by how many of its scope it dominates. Elements lie scope after scope."""
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
    """Rewards with bonuses, normalized over the fresh and the replayed rows of a group together.

    With ``R`` the reward plus the bonuses and the sample standard deviation::

        A = (R - mean(R)) / (scale * std(R) + epsilon)

    ``scale`` is 1 in a group without replayed rows. A group of one has mean 0 and standard deviation 1. Replayed rows
    come from an older policy, whose log-probs must be in ``old_log_probs``.

    Args:
        bonuses: What is added to the rewards.
        scale: Factor of the standard deviation in groups with replayed rows, at least 0.
        epsilon: Added to the denominator, at least 0.
    """

    bonuses: tuple[Bonus, ...] = parts(Bonus)
    scale: float = number(1.0, at_least=0)
    epsilon: float = number(1e-6, at_least=0)
    reads: ClassVar[frozenset[str]] = frozenset({"old_log_probs", "replayed"})

    def __call__(self, batch: Rollouts) -> Tensor:
        rewards = batch.rewards
        for bonus in self.bonuses:
            rewards = rewards + bonus(batch)
        shaped, groups = batch.with_rewards(rewards), batch.groups
        if self.scale == 1:
            return standardized(shaped, "normalized", self.epsilon)[:, None]
        joined = segment.count(groups.counting(batch.input("replayed"))) > 0
        scale = groups.per_row(torch.full_like(joined, self.scale, dtype=torch.float64).masked_fill_(~joined, 1))
        centred, divisor = outcome(shaped), scale * deviation(shaped, 0.0) + self.epsilon
        return torch.where(centred == 0, 0, centred / divisor).to(rewards.dtype)[:, None]


def r3(
    alpha: float = 1.0,
    share: float = 0.2,
    best: float = 0.5,
    max_length: int = 32768,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """R^3: GRPO whose groups with equal outcomes get stored responses of the other outcome, and ranked failures.

    Groups in which all or no responses are correct are joined by replayed responses of the opposite kind. With ``R``
    the reward plus two bonuses, over fresh and replayed responses together::

        A = (R - mean(R)) / (alpha * std(R) + epsilon)
        length bonus  = max(0, 1 - L / max_length)       for a correct response of L tokens
        ranking bonus = best * (1 - rank / (N - 1))      for the N truncated responses of a group without a correct one

    Truncated responses are ranked by the shape of their entropy: one dominates another if its largest entropies are
    larger and its mean entropy is smaller. The ratio of a replayed response is to the policy that sampled it. The
    trainer replays, and asks hard prompts again together with a wrong response and a request to reflect
    (``tokcredit.train.replay``).

    Args:
        alpha: Factor of the standard deviation in groups with replayed responses, at least 0. Above 1 it shrinks their
            advantages.
        share: Share of the largest entropies of a response that are compared, from 0 to 1; the paper's p.
        best: Bonus of the first ranked response, the paper's R_max. It should be below 1, so that no truncated response
            exceeds a correct one.
        max_length: Number of tokens from which on a correct response gets no length bonus, at least 1.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the denominator; the paper's lambda.

    Cost: GRPO with entropies from the forward pass for the old log-probs. Replayed responses need no sampling, and hard
        prompts another group.
    References: arXiv 2601.19620.
    Differences from the paper:
        - There is no KL term.
        - The paper writes the ratio of the whole sequence inside a sum over tokens. Here it is the token's ratio.
        - The paper's numbers were not found; ``alpha``, ``share``, ``best`` and ``epsilon`` are suggestions.
        - ``alpha`` acts only in groups with replayed responses; the paper leaves this open.
        - Old log-probs of replayed responses are those of the policy that sampled them; the paper leaves this open.
        - Responses that dominate equally many others have the mean of their ranks; the paper leaves ties open.
        - A single truncated response gets ``best`` next to a finished one, else 0; the paper's formula is 0 / 0 there.
        - Ranking and length bonus act from the first epoch on; the paper starts with the second.
    """
    return Objective(
        pooled((length_reward(max_length), dominance(share, best)), alpha, epsilon),
        clip=clip.ppo(clip_low, clip_high),
    )
