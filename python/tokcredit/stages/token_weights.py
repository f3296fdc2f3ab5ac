"""Token weights: factors of the token losses, decided once per batch. They do not change denominators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.rollouts import Rollouts
from tokcredit.stages import within as predicate
from tokcredit.stages.base import Stage, flag, number, part
from tokcredit.stages.token_score import TokenScore


class TokenWeight(Stage):
    """Base of token weights.

    Attributes:
        kind: ``"token_weight"``.
    """

    kind: ClassVar[str] = "token_weight"

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        """Return the weights.

        Args:
            batch: The rollouts. Tokens that filters rejected are False in its response mask.
            advantages: float ``[R, 1]`` or ``[N]``.

        Returns:
            float ``[R, 1]`` or ``[N]``.
        """
        raise NotImplementedError


_ENGINE = frozenset({"old_log_probs", "rollout_log_probs"})


def _importance(batch: Rollouts, whole_rows: bool) -> Tensor:
    """Return the probability under the trainer over that under the engine, of each token or of the whole row.

    A log-prob that the engine did not report (NaN) counts as equal.
    """
    difference = batch.input("old_log_probs") - batch.input("rollout_log_probs")
    difference = difference.double() if difference.dtype == torch.float64 else difference.float()
    difference = difference.masked_fill(~batch.response_mask | batch.input("rollout_log_probs").isnan(), 0)
    if whole_rows:
        difference = segment.sum(difference, batch.spans)[:, None]
    return difference.clamp(-20, 20).exp()


@dataclass(frozen=True)
class importance_truncated(TokenWeight):
    """Correct rollouts of an engine whose probabilities differ from the trainer's: ``min(p_old / p_engine, high)``.

    This is the truncated importance sampling of verl and TRL.

    Args:
        high: Largest weight, above 0.
        whole_rows: Whether the ratio is that of the whole row instead of the token's.
    """

    high: float = number(2.0, above=0, infinite=True)
    whole_rows: bool = flag(False)
    reads: ClassVar[frozenset[str]] = _ENGINE

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return _importance(batch, self.whole_rows).clamp(max=self.high)


@dataclass(frozen=True)
class importance_masked(TokenWeight):
    """The ratio ``p_old / p_engine`` where it lies in ``[low, high]``, else 0.

    Args:
        low: Smallest ratio that counts, at least 0.
        high: Largest ratio that counts, above 0.
        whole_rows: Whether the ratio is that of the whole row instead of the token's.
    """

    low: float = number(0.0, at_least=0)
    high: float = number(3.0, above=0, infinite=True)
    whole_rows: bool = flag(True)
    reads: ClassVar[frozenset[str]] = _ENGINE

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        ratio = _importance(batch, self.whole_rows)
        return torch.where((ratio < self.low) | (ratio > self.high), 0, ratio)


@dataclass(frozen=True)
class within(predicate.Recorded, TokenWeight):
    """1 where a statistic of the log-ratio between two recorded policies lies in ``[low, high]``, else 0.

    The same predicate as :class:`tokcredit.filters.within`, without changing a denominator.

    Args:
        statistic: ``ratio``, ``difference``, ``k1``, ``k2`` or ``k3``.
        over: ``token``, or how the tokens of a row are combined: ``sum``, ``mean``, ``max`` or ``min``.
        low: Lower bound.
        high: Upper bound.
        signs: Advantages the bounds hold for: ``any``, ``positive`` or ``negative``.
        of: Input with the log-probs of the trainer.
        to: Input with the log-probs that made the data.
    """

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        of, to = batch.input(self.of), batch.input(self.to)
        return self.inside(batch, advantages).to(torch.promote_types(of.dtype, to.dtype))


@dataclass(frozen=True)
class raised(TokenWeight):
    """``1 + strength * score``.

    Args:
        score: Score of each token.
        strength: Factor of the score.
    """

    score: TokenScore = part(TokenScore)
    strength: float = number()

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return 1 + self.strength * self.score(batch)


__all__ = ["TokenWeight", "importance_masked", "importance_truncated", "raised", "within"]
