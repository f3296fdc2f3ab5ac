"""The loss of a micro-batch, and the penalty for leaving a reference policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from tokcredit.choice import Choice


class Loss(NamedTuple):
    """``loss`` (0-d, differentiable) and ``metrics`` (0-d tensors by name, nothing synchronised)."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Penalty(Protocol):
    """Estimator of KL(policy || reference) per token, and its weight ``beta``."""

    surrogate: ClassVar[str]
    beta: float


_REFERENCE = frozenset({"ref_log_probs"})


@dataclass(frozen=True)
class k1(Choice):
    """``beta * u`` with ``u = log p - log p_ref``; unbiased, and its gradient is not that of the KL."""

    beta: float = 0.001
    reads: ClassVar[frozenset[str]] = _REFERENCE
    surrogate: ClassVar[str] = "k1"


@dataclass(frozen=True)
class k2(Choice):
    """``beta * u^2 / 2``; its expected gradient is that of the KL."""

    beta: float = 0.001
    reads: ClassVar[frozenset[str]] = _REFERENCE
    surrogate: ClassVar[str] = "k2"


@dataclass(frozen=True)
class k3(Choice):
    """``beta * (exp(-u) + u - 1)``; unbiased, never negative, low variance."""

    beta: float = 0.001
    reads: ClassVar[frozenset[str]] = _REFERENCE
    surrogate: ClassVar[str] = "k3"
