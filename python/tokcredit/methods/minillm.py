"""MiniLLM: distillation by policy gradients of the reverse KL divergence, each return per token that is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import scan, segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip, credit
from tokcredit.stages.aggregation import Aggregation
from tokcredit.stages.base import number, part
from tokcredit.stages.credit import Credit
from tokcredit.stages.term import Term


@dataclass(frozen=True)
class mean_ahead(Credit):
    """Discounted sum of another credit from the token on, divided by the number of tokens from there to the end.

    Args:
        of: The other credit.
        discount: Factor of each later token, from 0 to 1; may be a schedule or a controller.
    """

    of: Credit = part(Credit, credit.distilled)
    discount: float = number(0.95, at_least=0, at_most=1, scheduled=True)

    def __call__(self, batch: Rollouts) -> Tensor:
        given, spans = self.of(batch), batch.spans
        left = scan.returns(torch.ones_like(given), spans)
        return scan.returns(given, spans, self.discount) / left.clamp(min=1)


@dataclass(frozen=True)
class teacher_kl(Term):
    """The mean reverse KL divergence from a teacher.

    ``loss`` takes the divergences by name, with their gradient: ``loss(prepared, log_probs, reverse_kl=...)``. They are
    ``tokcredit.divergence.between(student_logits, teacher_logits, "reverse_kl")``.

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
        aggregation: How tokens are averaged, or None for the aggregation of the objective.
    """

    coefficient: float = number(1.0, at_least=0, scheduled=True)
    aggregation: Aggregation | None = part(Aggregation, None, optional=True)
    metric: ClassVar[str] = "reverse_kl"
    variables: ClassVar[frozenset[str]] = frozenset({"reverse_kl"})

    couples_tokens = False

    def __call__(self, variables: Mapping[str, Tensor], batch: Rollouts, spans: Spans, weights: Tensor) -> Tensor:
        return segment.weighted_sum(variables["reverse_kl"], spans, weights).sum()


def minillm(
    discount: float = 0.95, coefficient: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2
) -> Objective:
    """MiniLLM: policy gradients of the reverse KL of the rest of the response, plus the exact one of the next token.

    With ``r[t] = log p_teacher[t] - log p_old[t]``, tokens 1 to ``n`` in the row and ``q`` the importance ratio::

        R[t] = (sum over s >= t of discount^(s - t) * r[s]) / (n - t + 1)
        A = (R - mean(R)) / std(R) over all tokens of the batch
        loss = mean over all tokens of PPO's clipped loss of A and q
               + coefficient * mean over all tokens of KL(policy || teacher) of the next token

    ``loss`` is given the log-probs, and the divergences by name: ``loss(prepared, log_probs, reverse_kl=...)``.

    Args:
        discount: Factor of each later token, from 0 to 1; may be a schedule.
        coefficient: Factor of the exact divergence, at least 0; may be a schedule.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: No groups and no rewards; a forward pass of the teacher, whose logits the divergences need.
    References: arXiv 2306.08543.
    Differences from the paper:
        - ``R[t]`` contains ``r[t]``, as in the released code. The paper leaves it to the exact divergence.
        - Responses come from the policy alone. The paper samples from a mixture with the teacher and corrects for it.
        - The paper adds the language-modelling loss on a pretraining corpus.
        - Discount, whitening and clip range are those of the released code.
    Differences from the released code:
        - Mixture and pretraining corpus, as in the paper.
        - The release takes the mean and the standard deviation of A over a micro-batch on all ranks, with its padding.
    """
    return Objective(
        credit.whitened(mean_ahead(credit.distilled(), discount)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        terms=(teacher_kl(coefficient),),
    )
