"""Links: the loss of a preference pair from the scores of its two rows; TRL's ``loss_type``."""

from __future__ import annotations

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


__all__ = ["Link", "logistic"]
