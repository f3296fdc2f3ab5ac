"""Turn-level credit from log-ratios of a reference's distance to the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip
from tokcredit.stages.base import number, whole_number
from tokcredit.stages.credit import Credit
from tokcredit.turns import Turns


@dataclass(frozen=True)
class answer_progress(Credit):
    """TRACE's advantage: the outcome, plus for each turn how much nearer the answer came in it and in the next ones.

    With ``l[k]`` the reference's mean log-prob of the true answer after k turns, ``l[0]`` before the first::

        d[k] = 0.1 - l[k]
        delta[k] = log(d[k] / d[k + 1])                                             for turns k = 0 .. K - 1
        c[k] = sum of discount ** i * delta[k + i] / sum of discount ** i           i = 0 .. min(window, K - k) - 1
        c[k] += 2 * discount ** (K - k) * outcome                                   if k + window >= K
        A = outcome + weight * c[k]; the outcome alone in the turn after the last with an answer log-prob

    The outcome is ``(R - mean(R)) / (std(R) + epsilon)`` with the population standard deviation.

    Args:
        discount: gamma, from 0 to 1.
        window: Turns over which progress is averaged, at least 1.
        weight: Factor of c.
        epsilon: Added to the standard deviation, at least 0.
    """

    discount: float = number(0.8, at_least=0, at_most=1)
    window: int = whole_number(3, at_least=1)
    weight: float = number(0.2)
    epsilon: float = number(1e-6, at_least=0)
    reads: ClassVar[frozenset[str]] = frozenset({"ref_answer_log_probs", "ref_initial_answer_log_probs"})

    def __call__(self, batch: Rollouts) -> Tensor:
        groups, turns = batch.nonempty_groups, batch.turns
        moments = segment.moment_table(batch.rewards, groups, ddof=0.0)
        outcome = segment.standardize(
            batch.rewards, groups.index, moments, "normalized", self.epsilon, torch.float64
        ).index_select(0, turns.row)
        after = batch.input("ref_answer_log_probs").index_select(0, turns.last).double()
        scored = ~after.isnan()
        count = ops.count(turns.of_row(scored))
        if bool((scored & (turns.number >= count.index_select(0, turns.row))).any()):
            raise ValueError(
                "ref_answer_log_probs: expected them after every turn up to the last that has one, got a turn without"
            )
        before = torch.where(
            turns.number == 0,
            batch.input("ref_initial_answer_log_probs").double().index_select(0, turns.row),
            after.roll(1),
        )
        delta = torch.where(scored, (0.1 - before).log() - (0.1 - after).log(), 0)
        progress = windowed(delta, turns, count, outcome, self.discount, self.window)
        advantages = outcome + self.weight * torch.where(scored, progress, 0)
        return ops.spread(advantages, turns.spans).to(batch.rewards.dtype)


def windowed(delta: Tensor, turns: Turns, count: Tensor, outcome: Tensor, discount: float, window: int) -> Tensor:
    """Return ``c`` of :class:`answer_progress` for each turn, float64 ``[P]``.

    Args:
        delta: float64 ``[P]``, progress in each turn.
        turns: The turns.
        count: int64 ``[R]``, turns with progress, K.
        outcome: float64 ``[P]``, outcome of the turn's trajectory.
        discount: gamma.
        window: Turns over which progress is averaged.
    """
    left = count.index_select(0, turns.row) - turns.number
    total, weights = torch.zeros_like(delta), torch.zeros_like(delta)
    for i in range(window):
        inside = left > i
        total += torch.where(inside, discount**i * delta.roll(-i), 0)
        weights += discount**i * inside.double()
    progress = total / weights.clamp(min=1)
    return progress + torch.where(left <= window, 2 * discount ** left.clamp(min=0).double() * outcome, 0)


def trace(
    discount: float = 0.8,
    window: int = 3,
    weight: float = 0.2,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """TRACE: GRPO plus, for each turn, how much nearer a frozen reference came to the true answer in the next turns.

    With ``l[k]`` the reference's mean log-prob of the true answer after k turns::

        delta[k] = log((0.1 - l[k]) / (0.1 - l[k + 1]))
        c[k] = mean of delta[k], delta[k + 1], ... over a window, weighed by powers of discount
        c[k] += 2 * discount ** (K - k) * outcome                      where the window reaches the last of K turns
        A = outcome + weight * c[k]

    The outcome is ``(R - mean(R)) / (std(R) + epsilon)`` over the group, with the population standard deviation. The
    turn after the last ``ref_answer_log_probs``, which gives the answer, has the outcome alone.

    Args:
        discount: gamma, from 0 to 1.
        window: Turns over which progress is averaged, at least 1.
        weight: Factor of the progress.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.

    Cost: GRPO plus a forward pass of the reference model over the true answer after every turn.
    References: arXiv 2607.13988.
    Differences from the paper:
        - The paper was read in two transcriptions, which agree.
    """
    return Objective(answer_progress(discount, window, weight, epsilon), clip=clip.ppo(clip_low, clip_high))
