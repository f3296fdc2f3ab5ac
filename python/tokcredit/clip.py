"""How far a ratio may move a token: the window, and the surrogate it bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from tokcredit.ops import Rows


@dataclass(frozen=True)
class Window:
    """Surrogate and bounds on the log-ratio, which widen by ``position ** power`` along the row's unmasked tokens."""

    surrogate: str
    low: float = -math.inf
    high: float = math.inf
    cap: float | None = None
    power: float = 0.0


class Clip(Protocol):
    """The window of each token."""

    def __call__(self, rows: Rows, size: int) -> Window: ...


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


@dataclass(frozen=True)
class ppo:
    """``max(-A q, -A clip(q, 1 - low, 1 + high))``; where A < 0, at most ``-A cap`` if a cap is given.

    References:
        Schulman et al., arXiv 1707.06347; cap: Ye et al., arXiv 1912.09729.
    """

    low: float = 0.2
    high: float = 0.2
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.low < 0 or self.high < 0:
            raise ValueError(f"low, high: expected at least 0, got {self.low}, {self.high}")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"cap: expected at least 1, got {self.cap}")

    def __call__(self, rows: Rows, size: int) -> Window:
        cap = None if self.cap is None else math.log(self.cap)
        return Window("clip", _log(1 - self.low), math.log1p(self.high), cap)


@dataclass(frozen=True)
class growing:
    """The clipped surrogate in a log-space window that widens along the row: ``[-low, high] * position ** power``.

    Positions count the row's unmasked tokens from 1. Where A < 0 the loss is at most ``-A exp(cap * position **
    power)``; ``cap=None`` leaves that out.
    """

    low: float
    high: float
    power: float = 0.5
    cap: float | None = None

    def __call__(self, rows: Rows, size: int) -> Window:
        return Window("clip", -self.low, self.high, self.cap, self.power)


@dataclass(frozen=True)
class weighted:
    """``-sg[clip(q, 1 - low, 1 + high)] A log p``: the bounded ratio only weighs, so no token loses its gradient."""

    low: float = math.inf
    high: float = math.inf

    def __call__(self, rows: Rows, size: int) -> Window:
        return Window("weighted", _log(1 - self.low), math.log1p(self.high))


@dataclass(frozen=True)
class soft:
    """``-(4 / tau) sigmoid(tau (q - 1)) A``, with one temperature for each sign of A; no hard bound."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __call__(self, rows: Rows, size: int) -> Window:
        return Window("soft", self.tau_negative, self.tau_positive)


@dataclass(frozen=True)
class unclipped:
    """``-A q``."""

    def __call__(self, rows: Rows, size: int) -> Window:
        return Window("clip")
