"""Advantage scales: factors of the advantages that depend on the current policy.

A scale has no gradient and never changes a denominator. What it needs beside the current policy is decided once per
batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import within as predicate
from tokcredit.stages.base import Stage, input_name, number, option
from tokcredit.stages.clip import Window
from tokcredit.stages.credit.group import product
from tokcredit.stages.ratio import LogRatio


class Scale(Stage):
    """Base of advantage scales.

    Attributes:
        kind: ``"scale"``.
        needs_bounds: Whether it reads the bounds of the window.
        couples_rows: Whether the factor of a row depends on current log-probs of other rows of its group. Parts of a
            batch must then have whole groups, and the signal is the number of each row's group, from 0 and below the
            number of rows; int64 ``[R, 1]``.
        takes_rows: Whether it is given the log-ratio as ``[R, 1]`` where that is the same for all tokens of a row.
    """

    kind: ClassVar[str] = "scale"
    needs_bounds: ClassVar[bool] = False
    couples_rows: ClassVar[bool] = False
    takes_rows: ClassVar[bool] = False

    @property
    def couples_tokens(self) -> bool:
        """Whether the factor of a token depends on current log-probs of other tokens. True unless a class says no."""
        return True

    def signal(self, batch: Rollouts, window: Window) -> Tensor | None:
        """Return what the scale needs beside the current policy, ``[N]`` or ``[R, 1]``, or None.

        Args:
            batch: The rollouts.
            window: Window of the clip stage.
        """
        return batch.group_index[:, None] if self.couples_rows else None

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        """Return the factors.

        Args:
            log_probs: float ``[N]``, of the current policy, without gradient.
            log_ratio: float ``[N]``, of the ratio stage; or ``[R, 1]``, see ``takes_rows``.
            advantages: float ``[R, 1]`` or ``[N]``.
            spans: The rows, with the mask of the tokens that the policy chose.
            window: Of the clip stage; with ``needs_bounds`` each bound is one number or ``[N]``.
            signal: From :meth:`signal`, for these tokens.

        Returns:
            float ``[N]`` or ``[R, 1]``.
        """
        raise NotImplementedError

    def scaled(
        self,
        advantages: Tensor,
        log_probs: Tensor,
        log_ratio: LogRatio,
        credit: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        """Return advantages times the factors, float ``[R, 1]`` or ``[N]``.

        Args:
            advantages: float ``[R, 1]`` or ``[N]``, times the factors of earlier scales.
            log_probs: As in :meth:`__call__`.
            log_ratio: Of the ratio stage.
            credit: The advantages without factors, float ``[R, 1]`` or ``[N]``.
            spans: As in :meth:`__call__`.
            window: As in :meth:`__call__`.
            signal: As in :meth:`__call__`.
        """
        seen = log_ratio.per_row if self.takes_rows else None
        seen = log_ratio.per_token(spans, log_probs) if seen is None else seen
        return product(advantages, self(log_probs, seen, credit, spans, window, signal), spans)


@dataclass(frozen=True)
class within(Scale):
    """1 where a statistic of the current log-ratio lies in ``[low, high]``, else 0; NaN where the statistic is NaN.

    A NaN in the input ``to`` counts as a ratio of 1.

    Statistics are those of :func:`tokcredit.stages.within.measured`, on ``log_probs`` minus the input ``to``.

    Args:
        statistic: ``ratio``, ``difference``, ``k1``, ``k2`` or ``k3``.
        over: ``token``; ``turn`` for the mean over each run of tokens that the policy chose; or how the tokens of a row
            are combined: ``sum``, ``mean``, ``max`` or ``min``.
        low: Lower bound.
        high: Upper bound.
        signs: Advantages the bounds hold for: ``any``, ``positive`` or ``negative``.
        to: Input with the reference log-probs.
    """

    statistic: str = option(*predicate.STATISTICS)
    over: str = option(*predicate.OVER)
    low: float = number(-math.inf, infinite=True)
    high: float = number(math.inf, infinite=True)
    signs: str = option(*predicate.SIGNS)
    to: str = input_name("old_log_probs")

    @property
    def couples_tokens(self) -> bool:
        """Whether a statistic of the row is compared."""
        return self.over != "token"

    @property
    def required_inputs(self) -> frozenset[str]:
        """The input that ``to`` names."""
        return frozenset({self.to})

    def signal(self, batch: Rollouts, window: Window) -> Tensor | None:
        """Return the reference log-probs, float ``[N]``.

        Args:
            batch: The rollouts.
            window: Window of the clip stage.
        """
        return batch.input(self.to)

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        assert signal is not None
        x = predicate.measured(predicate.log_ratio(log_probs, signal), spans, self.statistic, self.over)
        inside = predicate.of_sign(self.signs, advantages, (x >= self.low) & (x <= self.high), spans)
        known = predicate.of_sign(self.signs, advantages, ~x.isnan(), spans)
        return inside.to(log_ratio.dtype).masked_fill_(~known, math.nan)


@dataclass(frozen=True)
class truncated_ratio(Scale):
    """The importance ratio, at most ``cap``: ``min(exp(clamp(log_ratio, -bound, bound)), cap)``.

    It is 1 in a batch without ``old_log_probs``.

    Args:
        cap: Largest factor, above 0.
        bound: Largest absolute log-ratio, nats, above 0.
    """

    cap: float = number(2.0, above=0)
    bound: float = number(20.0, above=0, infinite=True)

    couples_tokens = False

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        return log_ratio.clamp(-self.bound, self.bound).exp_().clamp_(max=self.cap)


@dataclass(frozen=True)
class teacher_log_ratio(Scale):
    """The log-ratio of a teacher to the current policy: ``log q - log p`` of each token.

    ``q`` is the teacher's probability of the token, and ``p`` that of the current policy. If the current policy sampled
    the tokens, the negative log-likelihood with this scale has, in expectation, the gradient of
    ``KL(policy || teacher)`` of the next token. If an older policy sampled them, add ``truncated_ratio``.
    ``credit.distilled`` has the log-ratio to the policy before the update.

    Args:
        to: Input with the log-probs of the teacher.
    """

    to: str = input_name("teacher_log_probs")

    couples_tokens = False

    @property
    def required_inputs(self) -> frozenset[str]:
        """The input that ``to`` names."""
        return frozenset({self.to})

    def signal(self, batch: Rollouts, window: Window) -> Tensor | None:
        """Return the log-probs of the teacher, float ``[N]``.

        Args:
            batch: The rollouts.
            window: Window of the clip stage.
        """
        return batch.input(self.to)

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        assert signal is not None
        return signal - log_probs


__all__ = ["Scale", "teacher_log_ratio", "truncated_ratio", "within"]
