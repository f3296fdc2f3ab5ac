"""Filters select the rows and tokens that train. Rejected ones are not counted in any denominator.

A filter *before credit* chooses rows from the rewards; the statistics of the credit stage do not see the others. The
other filters see the advantages and choose rows or tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment, select
from tokcredit.rollouts import Rollouts
from tokcredit.stages import within as predicate
from tokcredit.stages.base import Stage, flag, number, part
from tokcredit.stages.token_score import TokenScore


class Filter(Stage):
    """Base of filters.

    Attributes:
        kind: ``"filter"``.
        before_credit: Whether it selects rows before the credit stage runs, so that group statistics do not see the
            others.
    """

    kind: ClassVar[str] = "filter"
    before_credit: ClassVar[bool] = False

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        """Return what trains.

        Args:
            batch: The rollouts. Tokens that earlier filters rejected are False in its response mask.
            advantages: float ``[R, 1]`` or ``[N]``; None before credit.

        Returns:
            bool ``[R, 1]`` over rows or ``[N]`` over tokens.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class mixed_groups(Filter):
    """The groups whose rewards are not all equal."""

    before_credit: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        groups = batch.nonempty_groups
        varied = segment.maximum(batch.rewards, groups) > segment.minimum(batch.rewards, groups)
        return groups.per_row(varied)[:, None]


@dataclass(frozen=True)
class nonzero_advantage(Filter):
    """The rows with a nonzero advantage, so that groups without a learning signal leave the denominators."""

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        assert advantages is not None
        if advantages.dim() == 2:
            return advantages != 0
        size = torch.where(advantages.isnan(), math.inf, advantages.abs())
        return (segment.maximum(size, batch.spans) > 0)[:, None]


@dataclass(frozen=True)
class improbable(Filter):
    """The tokens to which the old policy gave a probability of less than ``below``.

    Args:
        below: Probability, from 0 to 1.
    """

    below: float = number(0.9, at_least=0, at_most=1)
    reads: ClassVar[frozenset[str]] = frozenset({"old_log_probs"})

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        return improbable_tokens(batch, self.below)


def improbable_tokens(batch: Rollouts, below: float) -> Tensor:
    """Return the tokens to which the old policy gave a probability of less than ``below``, bool ``[N]``.

    Args:
        batch: The rollouts, with ``old_log_probs``.
        below: Probability.
    """
    return batch.input("old_log_probs") < (math.log(below) if below > 0 else -math.inf)


@dataclass(frozen=True)
class top_share(Filter):
    """The share of the tokens with the highest score, at least one token. Ties go to the lower index.

    Args:
        share: Share of the tokens, above 0 and at most 1; may be a schedule.
        score: Score of each token.
        times_advantage: Whether to rank by the score times ``|advantage|``.
        per_row: Whether tokens compete in each row rather than in the whole batch.
        round_up: Whether the number of tokens is rounded up rather than down.
    """

    share: float = number(above=0, at_most=1, scheduled=True)
    score: TokenScore = part(TokenScore)
    times_advantage: bool = flag(False)
    per_row: bool = flag(False)
    round_up: bool = flag(True)

    @property
    def compares_groups(self) -> bool:
        """True unless tokens compete in each row."""
        return not self.per_row or super().compares_groups

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        assert advantages is not None
        score, spans = self.score(batch), batch.spans
        if self.times_advantage:
            size = advantages.abs()
            score = score * (size if size.dim() == 1 else ops.spread(size[:, 0], spans))
        scope = None if self.per_row else select.everything(spans)
        wanted = select.sizes(spans, scope).double().mul_(self.share)
        # A share like 0.7 of 10 must not become 8 for its rounding error.
        wanted = wanted.sub_(1e-9).ceil_() if self.round_up else wanted.add_(1e-9).floor_()
        return select.top_k(score, wanted.long().clamp_(min=1), spans, scope)


@dataclass(frozen=True)
class within(predicate.Recorded, Filter):
    """The tokens, or rows, where a statistic of the log-ratio between two recorded policies lies in ``[low, high]``.

    Statistics are those of :func:`tokcredit.stages.within.within`, on the input ``of`` minus the input ``to``.

    Args:
        statistic: ``ratio``, ``difference``, ``k1``, ``k2`` or ``k3``.
        over: ``token``, or how the tokens of a row are combined: ``sum``, ``mean``, ``max`` or ``min``.
        low: Lower bound.
        high: Upper bound.
        signs: Advantages the bounds hold for: ``any``, ``positive`` or ``negative``.
        of: Input with the log-probs of the trainer.
        to: Input with the log-probs that made the data.
    """

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        assert advantages is not None
        return self.inside(batch, advantages)


__all__ = [
    "Filter",
    "improbable",
    "improbable_tokens",
    "mixed_groups",
    "nonzero_advantage",
    "top_share",
    "within",
]
