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
class saturating(Credit):
    """The outcome, faded out once the row's potential has saturated, plus a bonus for steps that raise the potential.

    A step ends at a token with evidence; what follows the last one belongs to it. With ``a`` the probability of the
    true answer and ``c`` the confidence in some answer after step k::

        phi = 1.5 a c + 0.5 a - c
        fade = 1 - alpha (1 - exp(-(steps before k with phi > saturated)))
        jump = exp(minmax(phi_k - phi_(k-1)))              # over the steps of the batch; a first step changes 0
        A = (r - mean) fade + bonus (jump - mean of jump over the tokens of the batch)
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
    """DAPO whose reward fades once probes show the problem solved, plus a bonus for steps that raise the potential.

    After every reasoning step short answers are probed. How sure they are (c) and how probable the true answer is (a)
    make the potential ``1.5 a c + 0.5 a - c``. Groups of equal rewards are left out, and the advantages whitened over
    the tokens of the batch.

    Args:
        alpha: share of the outcome that may fade.
        bonus: weight of the jump in potential.
        saturated: a step whose potential exceeds it counts as solved.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO, plus five probes of ten tokens and a forced answer at the end of every step.
    Source: arXiv 2601.03823.
    Departs from the paper: it leaves open, and this takes, a threshold of 0.9 as in its probing script, DAPO's clip
    values, min-max over the steps and the mean over the tokens of the batch, and the last step for what follows it. A
    row without steps is one step whose potential has not changed.
    """
    return Objective(
        credit.whitened(saturating(alpha, bonus, saturated)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        filters=(filters.mixed_groups(),),
    )
