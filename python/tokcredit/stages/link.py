"""Links: the loss of a preference pair from the scores of its rows, TRL's ``loss_type``; and transforms of scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from tokcredit.stages.base import Stage, number, option


class Link(Stage):
    """Base of links.

    Attributes:
        kind: ``"link"``.
    """

    kind: ClassVar[str] = "link"

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the loss of each pair, float ``[P]``, with gradient to both scores.

        Args:
            chosen: float ``[P]``, scores of the chosen rows, nats.
            rejected: float ``[P]``, scores of the rejected rows, nats.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class logistic(Link):
    """``-log sigmoid(beta * (chosen - rejected) - margin)``, with optional label smoothing.

    With ``z = beta * (chosen - rejected) - margin`` and label smoothing e::

        loss = -(1 - e) * log sigmoid(z) - e * log sigmoid(-z)

    Args:
        beta: Strength of the preference, above 0.
        margin: Wanted margin, at least 0.
        label_smoothing: Assumed share of wrong labels e, at least 0 and below 0.5.
    """

    beta: float = number(0.1, above=0)
    margin: float = number(0.0, at_least=0)
    label_smoothing: float = number(0.0, at_least=0, below=0.5)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        z = self.beta * (chosen - rejected) - self.margin
        loss = -functional.logsigmoid(z)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * functional.logsigmoid(-z)
        return loss


@dataclass(frozen=True)
class robust(Link):
    """The logistic loss without the bias of wrong labels; TRL's ``robust``.

    With ``z = beta * (chosen - rejected)`` and the share e of wrong labels::

        loss = (-(1 - e) * log sigmoid(z) + e * log sigmoid(-z)) / (1 - 2 e)

    Args:
        beta: Strength of the preference, above 0.
        label_smoothing: Assumed share of wrong labels e, at least 0 and below 0.5.

    References:
        arXiv 2403.00409.
    """

    beta: float = number(0.1, above=0)
    label_smoothing: float = number(0.0, at_least=0, below=0.5)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        z, e = self.beta * (chosen - rejected), self.label_smoothing
        return (e * functional.logsigmoid(-z) - (1 - e) * functional.logsigmoid(z)) / (1 - 2 * e)


@dataclass(frozen=True)
class squared(Link):
    """IPO's ``(chosen - rejected - 1 / (2 beta))^2``.

    Args:
        beta: Strength of the regularization, above 0: the wanted difference of the scores is ``1 / (2 beta)``.

    References:
        arXiv 2310.12036.
    """

    beta: float = number(0.1, above=0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - rejected - 0.5 / self.beta).square()


@dataclass(frozen=True)
class hinge(Link):
    """``max(0, 1 - beta * (chosen - rejected))``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2305.10425.
    """

    beta: float = number(0.1, above=0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        loss = 1 - self.beta * (chosen - rejected)
        return loss.where(~(loss <= 0), 0)  # NaN stays, with its gradient


class Transform(Stage):
    """Base of transforms of scores.

    Attributes:
        kind: ``"transform"``.
    """

    kind: ClassVar[str] = "transform"

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the transformed scores, float ``[R]``, with gradient.

        Args:
            scores: float ``[R]``, sums over the tokens of each row, before they are divided by its length.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class f_divergence(Transform):
    """Scores under another divergence from the reference policy than ``KL(policy || reference)``, as in TRL.

    With S the log-ratio of a response::

        reverse_kl     S
        forward_kl     1 - exp(-S)
        js             log 2 + log sigmoid(S)
        alpha          (exp((alpha - 1) S) - 1) / (alpha - 1)

    Exponents are at most 80, above which a response has no gradient.

    Args:
        divergence: ``reverse_kl``, ``forward_kl``, ``js`` or ``alpha``.
        alpha: The alpha of ``alpha``; within 1e-6 of 1 the score is S.

    References:
        arXiv 2309.16240.
    """

    divergence: str = option("reverse_kl", "forward_kl", "js", "alpha")
    alpha: float = number(0.5)

    def __call__(self, scores: Tensor) -> Tensor:
        if self.divergence == "js":
            return math.log(2) + functional.logsigmoid(scores)
        rate = -1.0 if self.divergence == "forward_kl" else self.alpha - 1
        if self.divergence == "reverse_kl" or abs(rate) < 1e-6:
            return scores
        exponents = rate * scores
        return exponents.where(~(exponents > 80), 80).expm1() / rate  # NaN stays, with its gradient


__all__ = ["Link", "Transform", "f_divergence", "hinge", "logistic", "robust", "squared"]
