"""Which probability ratio weighs a token: its own, its row's, or that of everything up to it.

Whatever a ratio is made of, its gradient reaches only the log-prob of the current token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from tokcredit import ops, scan, segment
from tokcredit.choice import Choice
from tokcredit.ops import Rows


class LogRatio(NamedTuple):
    """How the loss gets ``log q``: given (``[N]`` or ``[R, 1]``), or as log_probs minus ``reference``, or 0.

    ``cumulative`` sums the differences along the row, each within ``[-bound, bound]``. The result is held in ``clamp``.
    """

    log_ratio: Tensor | None
    reference: Tensor | None
    clamp: tuple[float, float]
    cumulative: bool = False
    bound: float = math.inf

    def per_token(self, rows: Rows, log_probs: Tensor) -> Tensor:
        """``log q`` of each token, ``[N]``; as the loss computes it."""
        if self.log_ratio is not None:
            x = self.log_ratio if self.log_ratio.dim() == 1 else ops.spread(self.log_ratio[:, 0], rows, log_probs)
            return x.clamp(*self.clamp)
        x = log_probs - (log_probs if self.reference is None else self.reference)
        if self.cumulative:
            x = scan.cumulative(x.clamp_(-self.bound, self.bound), rows)
        return x.clamp_(*self.clamp)


class Ratio(Protocol):
    """The log-ratio of each token between the current policy and the one the update started from."""

    def __call__(self, rows: Rows, log_probs: Tensor, old_log_probs: Tensor) -> LogRatio: ...


@dataclass(frozen=True)
class token(Choice):
    """The token's own ratio, ``q[t] = p[t] / p_old[t]``, with ``|log q| <= bound``."""

    bound: float = 20.0

    def __call__(self, rows: Rows, log_probs: Tensor, old_log_probs: Tensor) -> LogRatio:
        return LogRatio(None, old_log_probs, (-self.bound, self.bound))


@dataclass(frozen=True)
class sequence(Choice):
    """The geometric mean of the row's ratios at every token, ``log q = mean_t(log p[t] - log p_old[t])``."""

    bound: float = 20.0
    high: float = 10.0

    def __call__(self, rows: Rows, log_probs: Tensor, old_log_probs: Tensor) -> LogRatio:
        difference = (log_probs.float() if log_probs.dtype.itemsize < 4 else log_probs) - old_log_probs
        mean = segment.mean(difference.clamp_(-self.bound, self.bound), rows)
        return LogRatio(mean[:, None], None, (-math.inf, self.high))


@dataclass(frozen=True)
class cumulative(Choice):
    """The ratio of the whole prefix, ``log q[t] = sum_{s <= t} (log p[s] - log p_old[s])``, at most ``high``."""

    bound: float = 20.0
    high: float = 10.0

    def __call__(self, rows: Rows, log_probs: Tensor, old_log_probs: Tensor) -> LogRatio:
        return LogRatio(None, old_log_probs, (-math.inf, self.high), cumulative=True, bound=self.bound)


@dataclass(frozen=True)
class one(Choice):
    """No ratio: ``q = 1``, the score-function estimator."""

    def __call__(self, rows: Rows, log_probs: Tensor, old_log_probs: Tensor) -> LogRatio:
        return LogRatio(None, None, (0.0, 0.0))
