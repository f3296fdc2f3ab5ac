"""Which tokens train, and how much: selections and multipliers, decided once per batch.

A weight maps a batch and its advantages to a tensor ``[R, 1]`` or ``[N]``. Bool selects: False tokens leave the mask
and every denominator with it, and the weights that follow do not see them. Float multiplies the token's loss and leaves
the denominators alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tokcredit import ops, segment, select
from tokcredit.choice import Choice
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import Schedule, number
from tokcredit.score import Score
from tokcredit.segment import Ids


class Weight(Protocol):
    """Selection (bool) or multiplier (float), ``[R, 1]`` or ``[N]``; ``needs`` names the evidence it reads."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor: ...


_ENGINE = frozenset({"old_log_probs", "rollout_log_probs"})


def _importance(batch: Rollouts, whole_rows: bool) -> Tensor:
    """Probability under the trainer over probability under the engine, of the token or of the whole row.

    A log-prob that the engine did not report (NaN) counts as equal.
    """
    assert batch.old_log_probs is not None and batch.rollout_log_probs is not None
    difference = batch.old_log_probs.float() - batch.rollout_log_probs.float()
    difference = difference.masked_fill(~batch.response_mask | difference.isnan(), 0)
    if whole_rows:
        difference = segment.sum(difference, batch.rows)[:, None]
    return difference.clamp(-20, 20).exp()


@dataclass(frozen=True)
class importance_truncated(Choice):
    """Corrects rollouts of an engine whose probabilities differ: ``min(trainer / engine, high)``.

    ``whole_rows`` takes the ratio of the whole response instead of the token's. Source: the truncated importance
    sampling of verl and TRL.
    """

    high: float = 2.0
    whole_rows: bool = False
    reads: ClassVar[frozenset[str]] = _ENGINE

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return _importance(batch, self.whole_rows).clamp(max=self.high)


@dataclass(frozen=True)
class importance_masked(Choice):
    """As :class:`importance_truncated`, but a ratio outside ``[low, high]`` counts 0."""

    low: float = 0.0
    high: float = 3.0
    whole_rows: bool = True
    reads: ClassVar[frozenset[str]] = _ENGINE

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        ratio = _importance(batch, self.whole_rows)
        return torch.where((ratio >= self.low) & (ratio <= self.high), ratio, 0)


@dataclass(frozen=True)
class with_credit(Choice):
    """Selects the rows that are paid anything, so that groups without signal leave the denominators."""

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        if advantages.dim() == 2:
            return advantages != 0
        paid = torch.where(advantages.isnan(), math.inf, advantages.abs())
        return (segment.maximum(paid, batch.rows) > 0)[:, None]


@dataclass(frozen=True)
class improbable(Choice):
    """Selects the tokens that the old policy gave a probability of less than ``below``."""

    below: float = 0.9
    reads: ClassVar[frozenset[str]] = frozenset({"old_log_probs"})

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return batch.improbable(self.below)


def _check_share(share: float | Schedule) -> None:
    if not isinstance(share, Schedule) and not 0 < share <= 1:
        raise ValueError(f"share: expected more than 0 and at most 1, got {share}")


@dataclass(frozen=True)
class varied_rows(Choice):
    """Selects the rows of the whole batch whose advantages vary most as a set: ``round(share * rows)``, at least 2.

    Rows without a token to train are neither counted nor chosen. Of advantages that vary inside a row the mean counts.

    References:
        arXiv 2509.22115.
    """

    share: float | Schedule
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share(self.share)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        paid = advantages[:, 0] if advantages.dim() == 2 else segment.mean(advantages, batch.rows)
        candidates = batch.lengths > 0
        count = (candidates.sum() * number(self.share)).round().long().clamp(min=2).reshape(1)
        return select.maximum_variance(paid, count, Ids(torch.where(candidates, 0, -1), 1))[:, None]


@dataclass(frozen=True)
class top_share(Choice):
    """Selects the share of the tokens with the highest score, at least one; among equals the first.

    ``paid`` ranks by the score times ``|advantage|``. ``per_row`` ranks inside each row, else all tokens of the batch
    compete. The number is rounded up, or down where ``round_up`` is False.
    """

    share: float | Schedule
    score: Score
    paid: bool = False
    per_row: bool = False
    round_up: bool = True

    def __post_init__(self) -> None:
        _check_share(self.share)

    @property
    def spans_groups(self) -> bool:
        return not self.per_row or super().spans_groups

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        score, rows = self.score(batch), batch.rows
        if self.paid:
            paid = advantages.abs()
            score = score * (paid if paid.dim() == 1 else ops.spread(paid[:, 0], rows, batch.tokens))
        scope = None if self.per_row else select.everything(rows)
        wanted = select.sizes(rows, scope).double() * number(self.share)
        # A share like 0.7 of 10 must not become 8 for its rounding error.
        wanted = (wanted - 1e-9).ceil() if self.round_up else (wanted + 1e-9).floor()
        return select.top_k(score, wanted.long().clamp(min=1), rows, scope)


@dataclass(frozen=True)
class drawn_share(Choice):
    """Selects a share of each row's tokens at random, without replacement, in proportion to a score; at least one.

    Rounded down. Drawn anew at every call, from torch's default generator.
    """

    share: float | Schedule
    score: Score

    def __post_init__(self) -> None:
        _check_share(self.share)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        x, rows = self.score(batch), batch.rows
        # The k largest of log x plus Gumbel noise are k draws without replacement in proportion to x.
        noise = -torch.empty_like(x, dtype=torch.float64).exponential_().log()
        wanted = (select.sizes(rows).double() * number(self.share) + 1e-9).floor()
        return select.top_k(x.double().log() + noise, wanted.long().clamp(min=1), rows)


@dataclass(frozen=True)
class raised(Choice):
    """Multiplies by ``1 + strength s``, s a score."""

    score: Score
    strength: float

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return 1 + self.strength * self.score(batch)
