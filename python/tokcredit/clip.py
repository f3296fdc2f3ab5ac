"""How far a ratio may move a token: the window, and the surrogate it bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from tokcredit import scan
from tokcredit.choice import Choice
from tokcredit.ops import Rows
from tokcredit.rollouts import Rollouts
from tokcredit.score import Score


@dataclass(frozen=True, eq=False)
class Window:
    """Surrogate and bounds on the log-ratio, each one number or ``[N]``.

    They widen by ``position ** power``, positions counting the tokens of the row that the policy chose, from 1. Where
    they come from a score, that and its values ``h``, ``[N]``, are kept.
    """

    surrogate: str
    low: float | Tensor = -math.inf
    high: float | Tensor = math.inf
    cap: float | Tensor | None = None
    power: float = 0.0
    score: Score | None = None
    h: Tensor | None = None

    def at(self, positions: Tensor) -> Window:
        """The windows of these tokens."""

        def pick(x: Any) -> Any:
            return x.index_select(0, positions) if isinstance(x, Tensor) else x

        return replace(self, low=pick(self.low), high=pick(self.high), cap=pick(self.cap), h=pick(self.h))

    def spelled_out(self, rows: Rows, size: int) -> Window:
        """The same with the bounds of each token in place of the power."""
        if not self.power:
            return self
        width = scan.positions(rows, size).clamp_(min=1).pow_(self.power)
        cap = None if self.cap is None else self.cap * width
        return replace(self, low=self.low * width, high=self.high * width, cap=cap, power=0.0)


class Clip(Protocol):
    """The windows of a batch, which do not depend on the current policy."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: Rollouts) -> Window: ...


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


@dataclass(frozen=True)
class ppo(Choice):
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

    def __call__(self, batch: Rollouts) -> Window:
        cap = None if self.cap is None else math.log(self.cap)
        return Window("clip", _log(1 - self.low), math.log1p(self.high), cap)


@dataclass(frozen=True)
class growing(Choice):
    """The clipped surrogate in a log-space window that widens along the row: ``[-low, high] * position ** power``.

    Positions count the row's unmasked tokens from 1. Where A < 0 the loss is at most ``-A exp(cap * position **
    power)``; ``cap=None`` leaves that out.
    """

    low: float
    high: float
    power: float = 0.5
    cap: float | None = None

    def __call__(self, batch: Rollouts) -> Window:
        return Window("clip", -self.low, self.high, self.cap, self.power)


@dataclass(frozen=True)
class widened(Choice):
    """The clipped surrogate whose lower bound widens where a score is negative, and whose upper where it is positive.

    With h the token's score, ``1 - low (1 - widen h)`` where ``h <= 0`` and ``1 + high (1 + widen h)`` where ``h > 0``;
    the other bound is that of :class:`ppo`, and so is the cap.
    """

    score: Score
    low: float = 0.2
    high: float = 0.2
    widen: float = 1.0
    cap: float | None = None

    def __call__(self, batch: Rollouts) -> Window:
        h = self.score(batch)
        low = h.clamp(max=0).mul_(self.low * self.widen).sub_(self.low).clamp_(min=-1)
        high = h.clamp(min=0).mul_(self.high * self.widen).add_(self.high)
        plain = ppo(self.low, self.high, self.cap)(batch)
        return replace(plain, low=low.log1p_(), high=high.log1p_(), score=self.score, h=h)


@dataclass(frozen=True)
class weighted(Choice):
    """``-sg[clip(q, 1 - low, 1 + high)] A log p``: the bounded ratio only weighs, so no token loses its gradient."""

    low: float = math.inf
    high: float = math.inf

    def __call__(self, batch: Rollouts) -> Window:
        return Window("weighted", _log(1 - self.low), math.log1p(self.high))


@dataclass(frozen=True)
class soft(Choice):
    """``-(4 / tau) sigmoid(tau (q - 1)) A``, with one temperature for each sign of A; no hard bound."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __call__(self, batch: Rollouts) -> Window:
        return Window("soft", self.tau_negative, self.tau_positive)


@dataclass(frozen=True)
class unclipped(Choice):
    """``-A q``."""

    def __call__(self, batch: Rollouts) -> Window:
        return Window("clip")
