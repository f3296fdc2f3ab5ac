"""Step potential advantage estimation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip, credit, filters
from tokcredit.stages.base import number
from tokcredit.stages.credit import Credit, outcome
from tokcredit.stages.credit.values import as_float


@dataclass(frozen=True)
class step_potential(Credit):
    """SPAE's advantage before whitening: the outcome, faded after the potential saturated, plus a bonus for its jumps.

    A step ends at a token with ``answer_probs`` and ``answer_confidences``; the tokens after the last such token belong
    to the last step. With ``a`` and ``c`` these two inputs at the end of step ``k``::

        phi[k] = 1.5 * a * c + 0.5 * a - c
        fade[k] = 1 - alpha * (1 - exp(-(number of steps j < k with phi[j] > saturated)))
        jump[k] = exp(minmax(phi[k] - phi[k - 1]))        # minmax over the steps of the batch; the first change is 0
        A = (r - mean(r)) * fade[k] + bonus * (jump[k] - mean of jump over the tokens of the batch)

    A row without such tokens is one step whose potential has not changed. ``minmax`` is 0 where all changes are equal.

    Args:
        alpha: Share of the outcome that can fade, from 0 to 1.
        bonus: Factor of the jumps, the paper's xi.
        saturated: A step whose potential exceeds this counts as saturated.
    """

    alpha: float = number(0.5, at_least=0, at_most=1)
    bonus: float = number(0.5)
    saturated: float = number(0.9)
    reads: ClassVar[frozenset[str]] = frozenset({"answer_probs", "answer_confidences"})
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        a, c = batch.input("answer_probs"), batch.input("answer_confidences")
        marks = batch.response_mask & ~(a.isnan() | c.isnan())
        step = segment.pieces(marks, batch.spans, after=True)
        a, c = as_float(step.take(a)), as_float(step.take(c))
        phi = 1.5 * a * c + 0.5 * a - c
        # The piece after a row's last step is part of it, and the only piece of a row without steps.
        last = step.offsets[1:] - 1
        has_steps = last > step.offsets[:-1]
        final = torch.where(has_steps, last - 1, last)
        before = ops.scan((phi > self.saturated).to(phi.dtype), step.of_row(step.marked), exclusive=True)[0]
        change = (phi - phi.roll(1)).index_fill_(0, step.offsets[:-1], 0)
        counted = Spans.single(phi.numel(), phi.device, step.marked.index_fill(0, final, True))
        low = segment.minimum(change, counted)
        width = segment.maximum(change, counted) - low
        jump = torch.where(width > 0, (change - low) / width, 0).exp()
        fade = 1 - self.alpha * (1 - (-before).exp())
        jump.index_copy_(0, last, jump[final])
        fade.index_copy_(0, last, fade[final])
        mean = (jump * ops.count(step.spans)).sum() / batch.lengths.sum().clamp(min=1)
        advantages = ops.spread(outcome(batch), step.of_row()) * fade + self.bonus * (jump - mean)
        return ops.spread(advantages, step.spans).to(a.dtype)


def spae(
    alpha: float = 0.5,
    bonus: float = 0.5,
    saturated: float = 0.9,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Objective:
    """SPAE: DAPO whose outcome fades once probes show the problem solved, plus a bonus for steps that help.

    After every reasoning step short answers are probed. With ``c`` the confidence in the answers and ``a`` the
    probability of the true answer::

        phi[k] = 1.5 * a * c + 0.5 * a - c
        fade[k] = 1 - alpha * (1 - exp(-(number of steps j < k with phi[j] > saturated)))
        jump[k] = exp(minmax(phi[k] - phi[k - 1]))
        A = whiten((r - mean(r)) * fade[k] + bonus * (jump[k] - mean(jump)))

    Groups with equal rewards are left out. ``whiten`` shifts and scales to mean 0 and variance 1 over the tokens of the
    batch.

    Args:
        alpha: Share of the outcome that can fade, from 0 to 1.
        bonus: Factor of the jumps, the paper's xi.
        saturated: A step whose potential exceeds this counts as solved.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: GRPO plus five probes of ten tokens and one forced answer at the end of every step.
    References: arXiv 2601.03823.
    Differences from the paper:
        - The paper's value of ``saturated`` was not found. 0.9 is the threshold of its probing script.
        - The paper's clip ranges were not found. They are those of DAPO.
        - The paper leaves the scope of ``minmax`` open. Here it is the steps of the batch.
        - The paper leaves open whether ``mean(jump)`` is over steps or tokens. Here it is over tokens.
        - Tokens after the last step belong to it; the paper leaves this open.
        - A response without steps is one step whose potential has not changed.
        - Whitening divides by ``sqrt(var + 1e-8)``.
    Differences from the released code:
        - The training code is not released. The probing script estimates ``a`` and ``c`` otherwise than the paper; the
          trainer here does it as the paper.
    """
    return Objective(
        credit.whitened(step_potential(alpha, bonus, saturated)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        filters=(filters.mixed_groups(),),
    )
