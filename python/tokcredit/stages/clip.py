"""Clip stages: how far the importance ratio may move before a token stops contributing gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import scan
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages.base import Stage, flag, number, option
from tokcredit.trajectories import Part


@dataclass(frozen=True, eq=False)
class Window:
    """A surrogate with bounds, each of which is one number, one per row ``[R, 1]`` or one per token ``[N]``.

    Bounds are log-ratios, except where a gated surrogate looks at another coordinate. They grow with
    ``position ** power``; positions count the tokens of the row that the policy chose, from 1.

    Attributes:
        surrogate: ``"clip"``, ``"soft"`` or ``"gated"``; see ``csrc/ops/policy_loss.hpp``.
        low: Lower bound.
        high: Upper bound.
        cap: Log of the dual-clip constant, the largest ratio in the loss of a token with a negative advantage, or None.
        power: How bounds grow along the row.
        gate: Further settings of a gated surrogate, by name.
        score: Token scores that the bounds come from, ``[N]``, or None.
        ranges: With a score, lower and upper clip range, and their growth where the score is -1 or 1.
    """

    surrogate: str
    low: float | Tensor = -math.inf
    high: float | Tensor = math.inf
    cap: float | Tensor | None = None
    power: float = 0.0
    gate: Mapping[str, Any] = field(default_factory=dict)
    score: Tensor | None = None
    ranges: tuple[float, float, float] | None = None

    def take(self, chosen: Part) -> Window:
        """Return the window of the tokens of some rows.

        Args:
            chosen: The rows.
        """

        def pick(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return chosen.of_tokens(x) if x.dim() == 1 else chosen.of_rows(x)

        bounds = {name: pick(getattr(self, name)) for name in ("low", "high", "cap", "score")}
        return replace(self, **bounds) if any(isinstance(x, Tensor) for x in bounds.values()) else self

    def per_token(self, spans: Spans) -> Window:
        """Return the same window, in which bounds that are not one number are those of each token, without a power.

        Args:
            spans: The rows, with the mask of the tokens that the policy chose.
        """

        def spread(x: Any) -> Any:
            return ops.spread(x[:, 0], spans) if isinstance(x, Tensor) and x.dim() == 2 else x

        if not self.power:
            bounds = {name: spread(getattr(self, name)) for name in ("low", "high", "cap")}
            same = all(bounds[name] is getattr(self, name) for name in bounds)
            return self if same else replace(self, **bounds)
        width = scan.positions(spans, torch.float64).clamp_(min=1).pow_(self.power)
        cap = None if self.cap is None else self.cap * width
        return replace(self, low=self.low * width, high=self.high * width, cap=cap, power=0.0)


class Clip(Stage):
    """Base of clip stages. The window of a batch does not depend on the current policy.

    Attributes:
        kind: ``"clip"``.
        has_bounds: Whether the window has a lower and an upper bound.
    """

    kind: ClassVar[str] = "clip"
    has_bounds: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        """Return the window.

        Args:
            batch: The rollouts.
            advantages: float ``[R, 1]`` or ``[N]``.
        """
        raise NotImplementedError


def log_bound(ratio: float) -> float:
    """Return the log of a bound on the ratio, -inf for a bound of 0 or less.

    Args:
        ratio: The bound.
    """
    return math.log(ratio) if ratio > 0 else -math.inf


def log_cap(cap: float | None) -> float | None:
    """Return the log of the largest ratio, or None without one.

    Args:
        cap: The largest ratio, above 0, or None.

    Raises:
        ValueError: It is not above 0.
    """
    if cap is not None and not cap > 0:
        raise ValueError(f"clip: cap: expected a number above 0 or None, got {cap}")
    return None if cap is None else math.log(cap)


@dataclass(frozen=True)
class ppo(Clip):
    """PPO's clipped surrogate, with an optional dual clip.

    For a token with ratio ``q`` and advantage ``A``::

        loss = max(-A * q, -A * clip(q, 1 - low, 1 + high))
        if A < 0 and cap is not None:
            loss = min(loss, -A * cap)

    Args:
        low: Lower clip range, at least 0. PPO and DAPO use 0.2.
        high: Upper clip range, at least 0. PPO uses 0.2, DAPO 0.28.
        cap: Dual-clip constant, at least 1, or None for no dual clip. verl uses 3.0.

    References:
        PPO: Schulman et al., arXiv 1707.06347. Dual clip: Ye et al., arXiv 1912.09729.
    """

    low: float = number(0.2, at_least=0, scheduled=True, infinite=True)
    high: float = number(0.2, at_least=0, scheduled=True, infinite=True)
    cap: float | None = number(None, at_least=1, optional=True, scheduled=True)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        cap = None if self.cap is None else math.log(self.cap)
        return Window("clip", log_bound(1 - self.low), math.log1p(self.high), cap)


@dataclass(frozen=True)
class growing(Clip):
    """The clipped surrogate with bounds on the log-ratio that grow along the row: ``[-low, high] * position ** power``.

    Positions count the tokens of the row that the policy chose, from 1.

    Args:
        low: Lower bound at position 1, nats, at least 0.
        high: Upper bound at position 1, nats, at least 0.
        power: Growth of the bounds, at least 0.
        cap: Where ``A < 0`` the loss is at most ``-A * exp(cap * position ** power)``; at least 0, or None for no cap.
    """

    low: float = number(at_least=0, scheduled=True, infinite=True)
    high: float = number(at_least=0, scheduled=True, infinite=True)
    power: float = number(0.5, at_least=0, scheduled=True)
    cap: float | None = number(None, at_least=0, optional=True, scheduled=True)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        return Window("clip", -self.low, self.high, self.cap, self.power)


@dataclass(frozen=True)
class gated(Clip):
    """A surrogate whose slope is ``-A * gate * weight``, which covers most trust regions.

    Per token, with ``x`` the log-ratio, ``l`` the current and ``o`` the reference log-prob::

        c = x | l - o | exp(l) - exp(o) | sign(l - o) * KL(Bernoulli(exp(o)) || Bernoulli(exp(l)))      # by `on`
        below = c < low and (A < 0 or both_sides);   above = c > high and (A > 0 or both_sides)
        weight = exp(min(x, cap)); where on == "ratio", exp(low) if below and exp(high) if above
        gate = outside_low if below, outside_high if above, else 1
        loss = -A * gate * weight * l

    Args:
        on: What the gate looks at: ``ratio`` (x), ``difference`` (l - o), ``probability`` or ``binary_kl``.
        low: Lower bound, at most 0, in units of the coordinate: nats, or a probability.
        high: Upper bound, at least 0, in the same units.
        outside_low: Gate below the lower bound, at least 0.
        outside_high: Gate above the upper bound, at least 0.
        cap: Largest log-ratio of the weight, or None for no cap.
        both_sides: Whether bounds hold for advantages of either sign. Otherwise, as in PPO, the lower bound holds
            for negative and the upper for positive advantages.
    """

    on: str = option("ratio", "difference", "probability", "binary_kl")
    low: float = number(-math.inf, at_most=0, scheduled=True, infinite=True)
    high: float = number(math.inf, at_least=0, scheduled=True, infinite=True)
    outside_low: float = number(0.0, at_least=0, scheduled=True)
    outside_high: float = number(0.0, at_least=0, scheduled=True)
    cap: float | None = number(None, optional=True, scheduled=True)
    both_sides: bool = flag(False)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        gate = {"on": self.on, "outside_low": self.outside_low, "outside_high": self.outside_high}
        return Window("gated", self.low, self.high, self.cap, gate={**gate, "both_sides": self.both_sides})


@dataclass(frozen=True)
class soft(Clip):
    """A sigmoid gate in place of bounds: ``loss = -(4 / tau) * sigmoid(tau * (q - 1)) * A``.

    Args:
        tau_positive: Temperature where ``A > 0``, above 0.
        tau_negative: Temperature where ``A <= 0``, above 0.
    """

    tau_positive: float = number(1.0, above=0, scheduled=True)
    tau_negative: float = number(1.05, above=0, scheduled=True)
    has_bounds: ClassVar[bool] = False

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        return Window("soft", self.tau_negative, self.tau_positive)


@dataclass(frozen=True)
class unclipped(Clip):
    """No bounds: ``loss = -A * q``."""

    has_bounds: ClassVar[bool] = False

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Window:
        return Window("clip")


__all__ = ["Clip", "Window", "gated", "growing", "ppo", "soft", "unclipped"]
