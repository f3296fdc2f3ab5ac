"""Ratio stages: the importance ratio of each token between the current policy and the one that made the data.

The gradient of a ratio reaches only the log-prob of its own token, also where the ratio contains log-probs of other
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import scan, segment
from tokcredit.spans import Spans
from tokcredit.stages.base import Stage, input_name, number, option


class LogRatio(NamedTuple):
    """How the loss obtains the log-ratio of each token.

    Attributes:
        log_ratio: ``[N]`` or ``[R, 1]``, or None to take ``log_probs - reference``.
        reference: ``[N]``, or None. If ``log_ratio`` is None as well, the log-ratio is 0.
        clamp: Bounds that the result is clamped to.
        cumulative: Whether differences are summed along the row.
        bound: Each difference is clamped to ``[-bound, bound]`` before it is summed.
    """

    log_ratio: Tensor | None
    reference: Tensor | None
    clamp: tuple[float, float]
    cumulative: bool = False
    bound: float = math.inf

    @property
    def per_row(self) -> Tensor | None:
        """The log-ratio of each row as the loss computes it, ``[R, 1]``, or None where that of tokens differs."""
        given = self.log_ratio
        return None if given is None or given.dim() == 1 else given.clamp(*self.clamp)

    def per_token(self, spans: Spans, log_probs: Tensor) -> Tensor:
        """Return the log-ratio of each token as the loss computes it, ``[N]``.

        Args:
            spans: The rows.
            log_probs: float ``[N]``, of the current policy, without gradient.
        """
        if self.log_ratio is not None:
            x = self.log_ratio if self.log_ratio.dim() == 1 else ops.spread(self.log_ratio[:, 0], spans)
            return x.clamp(*self.clamp)
        x = log_probs - (log_probs if self.reference is None else self.reference)
        if self.cumulative:
            x = scan.cumulative(x.clamp_(-self.bound, self.bound), spans)
        return x.clamp_(*self.clamp)


class Ratio(Stage):
    """Base of ratio stages.

    Attributes:
        kind: ``"ratio"``.
        couples_tokens: Whether the ratio of a token depends on other tokens of its row.
        to: Input with the log-probs that the ratio divides by; NaN in it makes the loss NaN. With ``old_log_probs`` and
            a batch that has none, the ratio is 1 and its gradient is that of the on-policy loss.
    """

    kind: ClassVar[str] = "ratio"
    couples_tokens: ClassVar[bool] = False
    to: str

    @property
    def required_inputs(self) -> frozenset[str]:
        """The input that ``to`` names, unless that is ``old_log_probs``."""
        to = getattr(self, "to", "old_log_probs")
        return super().required_inputs | (frozenset() if to == "old_log_probs" else frozenset({to}))

    def __call__(self, spans: Spans, log_probs: Tensor, reference: Tensor, advantages: Tensor) -> LogRatio:
        """Return how the loss obtains the log-ratios.

        Args:
            spans: The rows, with the mask of the tokens that the policy chose.
            log_probs: float ``[N]``, of the current policy, without gradient.
            reference: float ``[N]``, the input that ``to`` names.
            advantages: float ``[R, 1]`` or ``[N]``.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class token(Ratio):
    """The token's own ratio, ``q[t] = p[t] / p_old[t]``.

    Args:
        bound: The log-ratio is clamped to ``[-bound, bound]``; above 0.
        to: Input with the log-probs that the ratio divides by.
    """

    bound: float = number(20.0, above=0, infinite=True)
    to: str = input_name("old_log_probs")

    def __call__(self, spans: Spans, log_probs: Tensor, reference: Tensor, advantages: Tensor) -> LogRatio:
        return LogRatio(None, reference, (-self.bound, self.bound))


@dataclass(frozen=True)
class sequence(Ratio):
    """One ratio per row, the same at every token: ``log q = mean_t(log p[t] - log p_old[t])``, or the sum.

    The mean gives the geometric mean of the ratios of the row's tokens, the sum their product.

    Args:
        bound: Differences are clamped to ``[-bound, bound]`` before they are combined; above 0.
        high: The log-ratio is at most this; at least 0.
        to: Input with the log-probs that the ratio divides by.
        over: ``mean`` or ``sum``.
    """

    bound: float = number(math.inf, above=0, infinite=True)
    high: float = number(10.0, at_least=0, infinite=True)
    to: str = input_name("old_log_probs")
    over: str = option("mean", "sum")
    couples_tokens: ClassVar[bool] = True

    def __call__(self, spans: Spans, log_probs: Tensor, reference: Tensor, advantages: Tensor) -> LogRatio:
        difference = (log_probs.float() if log_probs.dtype.itemsize < 4 else log_probs) - reference
        if self.bound < math.inf:
            difference = difference.clamp_(-self.bound, self.bound)
        combined = (segment.mean if self.over == "mean" else segment.sum)(difference, spans)
        return LogRatio(combined[:, None], None, (-math.inf, self.high))


@dataclass(frozen=True)
class cumulative(Ratio):
    """The ratio of the prefix up to each token: ``log q[t] = sum_{s <= t} (log p[s] - log p_old[s])``.

    Args:
        bound: Differences are clamped to ``[-bound, bound]`` before they are summed; above 0.
        high: The log-ratio is at most this; at least 0.
        to: Input with the log-probs that the ratio divides by.
    """

    bound: float = number(20.0, above=0, infinite=True)
    high: float = number(10.0, at_least=0, infinite=True)
    to: str = input_name("old_log_probs")
    couples_tokens: ClassVar[bool] = True

    def __call__(self, spans: Spans, log_probs: Tensor, reference: Tensor, advantages: Tensor) -> LogRatio:
        return LogRatio(None, reference, (-math.inf, self.high), cumulative=True, bound=self.bound)


@dataclass(frozen=True)
class one(Ratio):
    """No ratio: ``q = 1``, the score-function estimator."""

    def __call__(self, spans: Spans, log_probs: Tensor, reference: Tensor, advantages: Tensor) -> LogRatio:
        return LogRatio(None, None, (0.0, 0.0))


__all__ = ["LogRatio", "Ratio", "cumulative", "one", "sequence", "token"]
