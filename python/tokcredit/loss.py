"""The loss of a micro-batch, and the penalty for leaving a reference policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor


class Loss(NamedTuple):
    """``loss`` (0-d, differentiable) and ``metrics`` (0-d tensors by name, nothing synchronised)."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Penalty(Protocol):
    """Estimator of KL(policy || reference) per token, and its weight ``beta``."""

    surrogate: ClassVar[str]
    beta: float


@dataclass(frozen=True)
class k1:
    """``beta * u`` with ``u = log p - log p_ref``; unbiased, and its gradient is not that of the KL."""

    beta: float = 0.001
    surrogate: ClassVar[str] = "k1"


@dataclass(frozen=True)
class k2:
    """``beta * u^2 / 2``; its expected gradient is that of the KL."""

    beta: float = 0.001
    surrogate: ClassVar[str] = "k2"


@dataclass(frozen=True)
class k3:
    """``beta * (exp(-u) + u - 1)``; unbiased, never negative, low variance."""

    beta: float = 0.001
    surrogate: ClassVar[str] = "k3"
