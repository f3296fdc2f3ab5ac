"""Links: the loss of a preference pair from the scores of its two rows; TRL's ``loss_type``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from tokcredit.stages.base import Stage, number


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
class alpha_logistic(Link):
    """AlphaPO's logistic loss of scores that are bent by an exponential; TRL's CPO with ``alpha``.

    With ``f(score) = (1 - exp(-alpha * score)) / alpha``, or the score itself with an alpha of 0::

        loss = -log sigmoid(beta * (f(chosen) - f(rejected)) - margin)

    Scores should be means over tokens. A sum can be so large that the exponential overflows.

    Args:
        beta: Strength of the preference, above 0.
        margin: Wanted margin, at least 0.
        alpha: Shape. Above 0 a low score counts more than in SimPO, below 0 less.

    References:
        arXiv 2501.03884.
    """

    beta: float = number(2.5, above=0)
    margin: float = number(0.0, at_least=0)
    alpha: float = number(0.25)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.alpha:
            chosen, rejected = (-(-self.alpha * x).expm1() / self.alpha for x in (chosen, rejected))
        return -functional.logsigmoid(self.beta * (chosen - rejected) - self.margin)


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


@dataclass(frozen=True)
class exo_pair(Link):
    """EXO's reverse KL between the policy's preference and smoothed labels.

    With ``q = sigmoid(beta * (chosen - rejected))`` and the label smoothing e::

        loss = q * (log q - log(1 - e)) + (1 - q) * (log(1 - q) - log e)

    Args:
        beta: Strength of the preference, above 0.
        label_smoothing: Assumed share of wrong labels e, above 0 and below 0.5.

    References:
        arXiv 2402.00856.
    """

    beta: float = number(0.1, above=0)
    label_smoothing: float = number(0.001, above=0, below=0.5)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        z, e = self.beta * (chosen - rejected), self.label_smoothing
        of_right = z.sigmoid() * (functional.logsigmoid(z) - math.log1p(-e))
        return of_right + (-z).sigmoid() * (functional.logsigmoid(-z) - math.log(e))


@dataclass(frozen=True)
class nca_pair(Link):
    """NCA: ``-log sigmoid(beta * chosen) - (log sigmoid(-beta * chosen) + log sigmoid(-beta * rejected)) / 2``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2402.05369.
    """

    beta: float = number(0.1, above=0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        below = functional.logsigmoid(-self.beta * chosen) + functional.logsigmoid(-self.beta * rejected)
        return -functional.logsigmoid(self.beta * chosen) - below / 2


@dataclass(frozen=True)
class bco_pair(Link):
    """BCO without a running mean: ``-log sigmoid(beta * chosen) - log sigmoid(-beta * rejected)``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2404.04656.
    """

    beta: float = number(0.1, above=0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -functional.logsigmoid(self.beta * chosen) - functional.logsigmoid(-self.beta * rejected)


@dataclass(frozen=True)
class sppo_hard(Link):
    """SPPO with certain labels: ``(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2``.

    Args:
        beta: Strength of the regularization, above 0.

    References:
        arXiv 2405.00675.
    """

    beta: float = number(0.1, above=0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square()


@dataclass(frozen=True)
class apo_zero(Link):
    """APO for a policy worse than the chosen responses: ``1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2408.06266.
    """

    beta: float = number(0.1, above=0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return 1 - (self.beta * chosen).sigmoid() + (self.beta * rejected).sigmoid()


@dataclass(frozen=True)
class apo_down(Link):
    """APO for a policy better than the chosen responses, which it makes less likely, but the rejected ones more so.

    ``sigmoid(beta * chosen) + 1 - sigmoid(beta * (chosen - rejected))``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2408.06266.
    """

    beta: float = number(0.1, above=0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (self.beta * chosen).sigmoid() + 1 - (self.beta * (chosen - rejected)).sigmoid()


@dataclass(frozen=True)
class discopop(Link):
    """DiscoPOP's mixture of the logistic and the exponential loss. It is not monotone: its slope can be positive.

    With ``z = beta * (chosen - rejected)`` and ``k = sigmoid(z / tau)``::

        loss = (1 - k) * -log sigmoid(z) + k * exp(-z)

    Args:
        beta: Strength of the preference, above 0.
        tau: Temperature of the mixture, above 0.

    References:
        arXiv 2406.08414.
    """

    beta: float = number(0.1, above=0)
    tau: float = number(0.05, above=0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        z = self.beta * (chosen - rejected)
        k = (z / self.tau).sigmoid()
        return k * (-z).exp() - (1 - k) * functional.logsigmoid(z)


__all__ = [
    "Link",
    "alpha_logistic",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "discopop",
    "exo_pair",
    "hinge",
    "logistic",
    "nca_pair",
    "robust",
    "sppo_hard",
    "squared",
]
