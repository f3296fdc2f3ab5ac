"""Token scores: numbers that rank or weigh the tokens of a batch, computed from its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment, select
from tokcredit.rollouts import Rollouts
from tokcredit.stages.base import Stage, input_name, number, part


class TokenScore(Stage):
    """Base of token scores.

    Attributes:
        kind: ``"token_score"``.
    """

    kind: ClassVar[str] = "token_score"

    def __call__(self, batch: Rollouts) -> Tensor:
        """Return a score per token, float ``[N]``. Its value at masked tokens means nothing.

        Args:
            batch: The rollouts.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class given(TokenScore):
    """A registered per-token input as it is.

    Args:
        name: Name of the input.
    """

    name: str = input_name()

    @property
    def required_inputs(self) -> frozenset[str]:
        """The named input."""
        return frozenset({self.name})

    def __call__(self, batch: Rollouts) -> Tensor:
        return batch.input(self.name)


@dataclass(frozen=True)
class scaled(TokenScore):
    """Another score, min-max scaled to ``[0, 1]`` in each row; 0 in a row of equal scores, NaN in a row with a NaN.

    Args:
        of: The other score.
        quantile: Scores above this quantile of the whole batch are first lowered to it; None to leave them.
    """

    of: TokenScore = part(TokenScore)
    quantile: float | None = number(None, at_least=0, at_most=1, optional=True)

    @property
    def compares_groups(self) -> bool:
        """True with a quantile."""
        return self.quantile is not None or super().compares_groups

    def __call__(self, batch: Rollouts) -> Tensor:
        x, spans = self.of(batch), batch.spans
        x = x if x.dtype == torch.float64 else x.float()
        if self.quantile is not None:
            x = torch.minimum(x, select.quantile(x, self.quantile, spans, select.everything(spans)).to(x.dtype))
        low = segment.minimum(x, spans)
        width = ops.spread(segment.maximum(x, spans) - low, spans)
        return torch.where(width == 0, 0, (x - ops.spread(low, spans)) / width)


@dataclass(frozen=True)
class either(TokenScore):
    """``1 - (1 - a) (1 - b)`` of two scores in ``[0, 1]``: high where one of them is.

    This form keeps exact ties, which ``a + b - a b`` breaks by rounding.

    Args:
        first: Score a.
        second: Score b.
    """

    first: TokenScore = part(TokenScore)
    second: TokenScore = part(TokenScore)

    def __call__(self, batch: Rollouts) -> Tensor:
        return 1 - (1 - self.first(batch)) * (1 - self.second(batch))


@dataclass(frozen=True)
class but_not(TokenScore):
    """``a (1 - b)`` of two scores: high where the first is high and the second, in ``[0, 1]``, is low.

    Args:
        first: Score a.
        second: Score b.
    """

    first: TokenScore = part(TokenScore)
    second: TokenScore = part(TokenScore)

    def __call__(self, batch: Rollouts) -> Tensor:
        return self.first(batch) * (1 - self.second(batch))


@dataclass(frozen=True)
class log_ratio(TokenScore):
    """``scale * (a - b)`` of the log-probs of two policies: the reward of a token that the first one implies.

    Args:
        of: Input with the log-probs a.
        to: Input with the log-probs b.
        scale: Factor of the difference.

    References:
        arXiv 2404.12358.
    """

    of: str = input_name()
    to: str = input_name("ref_log_probs")
    scale: float = number(1.0)

    @property
    def required_inputs(self) -> frozenset[str]:
        """The two inputs that are compared."""
        return frozenset({self.of, self.to})

    def __call__(self, batch: Rollouts) -> Tensor:
        return self.scale * (batch.input(self.of) - batch.input(self.to))


__all__ = ["TokenScore", "but_not", "either", "given", "log_ratio", "scaled"]
