"""How the current ratio scales what a token is paid, evaluated anew in every micro-batch.

A gain is a factor per token, without a gradient. What it needs beside the ratio is decided once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tokcredit.choice import Choice
from tokcredit.clip import Window
from tokcredit.rollouts import Rollouts
from tokcredit.score import Score


class Gain(Protocol):
    """A factor ``[N]`` of the advantages."""

    @property
    def needs(self) -> frozenset[str]: ...

    def signal(self, batch: Rollouts, window: Window) -> Tensor | None:
        """A number per token, ``[N]``, from the evidence of the batch, or None if ratio and window are enough."""

    def __call__(self, log_ratio: Tensor, window: Window, signal: Tensor | None) -> Tensor:
        """The factors, from the log-ratio ``[N]`` and the signal of the same tokens."""


@dataclass(frozen=True)
class divergence(Choice):
    """``1 + strength (sigmoid(slope k) - 1/2)`` with ``k = (q - 1) - log q >= 0``, how far the token's policy moved.

    In ``[1, 1 + strength / 2)`` for a positive slope, which favours tokens that moved, and in
    ``(1 - strength / 2, 1]`` for a negative one.
    """

    strength: float = 1.0
    slope: float = 10.0

    def signal(self, batch: Rollouts, window: Window) -> None:
        return None

    def __call__(self, log_ratio: Tensor, window: Window, signal: Tensor | None) -> Tensor:
        moved = log_ratio.expm1().sub_(log_ratio)
        return moved.mul_(self.slope).sigmoid_().sub_(0.5).mul_(self.strength).add_(1)


@dataclass(frozen=True)
class outside_center(Choice):
    """``1 + strength h``, h a score, for tokens of positive score whose ratio has moved and of negative whose has not.

    The ratio has moved when it is outside the middle half of its window, ``(1 + (low - 1) / 2, 1 + (high - 1) / 2)``
    for a window ``[low, high]``; the other tokens keep what they are paid.
    """

    score: Score
    strength: float = 1.0

    def signal(self, batch: Rollouts, window: Window) -> Tensor | None:
        return None if window.score == self.score else self.score(batch)

    def __call__(self, log_ratio: Tensor, window: Window, signal: Tensor | None) -> Tensor:
        h = window.h if signal is None else signal
        assert h is not None
        # The log of where the ratio would be had it moved twice as far; NaN below 0.
        twice = log_ratio.expm1().mul_(2).log1p_()
        still = (twice > window.low) & (twice < window.high)
        return (self.strength * h).mul_((h > 0) != still).add_(1)
