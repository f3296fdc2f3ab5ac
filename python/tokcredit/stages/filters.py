"""Filters select the rows and tokens that train. Rejected ones are not counted in any denominator.

A filter *before credit* chooses rows from the rewards; the statistics of the credit stage do not see the others. The
other filters see the advantages and choose rows or tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokcredit import inputs, ops
from tokcredit.blocks import segment, select
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import within as predicate
from tokcredit.stages.base import Stage, flag, input_name, number, option, part
from tokcredit.stages.token_score import TokenScore


class Filter(Stage):
    """Base of filters.

    Attributes:
        kind: ``"filter"``.
        before_credit: Whether it selects rows before the credit stage runs, so that group statistics do not see the
            others.
    """

    kind: ClassVar[str] = "filter"
    before_credit: ClassVar[bool] = False

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        """Return what trains.

        Args:
            batch: The rollouts. Tokens that earlier filters rejected are False in its response mask.
            advantages: float ``[R, 1]`` or ``[N]``; None before credit.

        Returns:
            bool ``[R, 1]`` over rows or ``[N]`` over tokens.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class mixed_groups(Filter):
    """The groups whose rewards are not all equal."""

    before_credit: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        groups = batch.nonempty_groups
        varied = segment.maximum(batch.rewards, groups) > segment.minimum(batch.rewards, groups)
        return groups.per_row(varied)[:, None]


@dataclass(frozen=True)
class nonzero_advantage(Filter):
    """The rows with a nonzero advantage, so that groups without a learning signal leave the denominators."""

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        assert advantages is not None
        if advantages.dim() == 2:
            return advantages != 0
        size = torch.where(advantages.isnan(), math.inf, advantages.abs())
        return (segment.maximum(size, batch.spans) > 0)[:, None]


@dataclass(frozen=True)
class marked(Filter):
    """The rows or tokens where a bool input is True.

    Args:
        name: Name of the input.
        inverted: Whether to take those where it is False instead.
    """

    name: str = input_name()
    inverted: bool = flag(False)

    @property
    def required_inputs(self) -> frozenset[str]:
        """The named input."""
        return super().required_inputs | {self.name}

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        if inputs.get(self.name).dtype != "bool":
            raise TypeError(f"marked: name: expected a bool input, got {self.name}, a {inputs.get(self.name).dtype}")
        chosen = batch.input(self.name) != self.inverted
        return chosen if inputs.get(self.name).per == "token" else chosen[:, None]


@dataclass(frozen=True)
class improbable(Filter):
    """The tokens to which the old policy gave a probability of less than ``below``.

    Args:
        below: Probability, from 0 to 1.
    """

    below: float = number(0.9, at_least=0, at_most=1)
    reads: ClassVar[frozenset[str]] = frozenset({"old_log_probs"})

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        return improbable_tokens(batch, self.below)


def improbable_tokens(batch: Rollouts, below: float) -> Tensor:
    """Return the tokens to which the old policy gave a probability of less than ``below``, bool ``[N]``.

    Args:
        batch: The rollouts, with ``old_log_probs``.
        below: Probability.
    """
    return batch.input("old_log_probs") < (math.log(below) if below > 0 else -math.inf)


def covariance(batch: Rollouts, advantages: Tensor) -> Tensor:
    """Return ``(A - mean(A)) * (log p_old - mean(log p_old))`` of each token, with means over the training tokens.

    Args:
        batch: The rollouts, with ``old_log_probs``.
        advantages: float ``[R, 1]`` or ``[N]``.

    Returns:
        float ``[N]``; its value at masked tokens means nothing.
    """
    return ops.row_affine(*_covariance(batch, advantages), batch.spans)


def covariance_between(batch: Rollouts, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return the training tokens whose covariance lies between two bounds, bool ``[N]``; see :func:`covariance`.

    Args:
        batch: The rollouts, with ``old_log_probs``.
        advantages: float ``[R, 1]`` or ``[N]``.
        low: Lower bound, exclusive.
        high: Upper bound, exclusive.
    """
    return ops.row_between(*_covariance(batch, advantages), batch.spans, low, high)


def _covariance(batch: Rollouts, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers of tokens, ``[N]``, and the linear function of each row that makes the covariance of them."""
    log_probs, tokens = batch.input("old_log_probs"), batch.single.with_mask(batch.response_mask)
    middle = segment.mean(log_probs, tokens)
    if advantages.dim() == 1:
        product = (advantages - segment.mean(advantages, tokens)) * (log_probs - middle)
        return product, torch.ones_like(middle[0]), torch.zeros_like(middle[0])
    factor = advantages[:, 0] - segment.mean(ops.spread(advantages[:, 0], batch.spans), tokens)
    return log_probs, factor, -factor * middle


def highest(
    score: Tensor, share: float, spans: Spans, scope: segment.Ids | None = None, round_up: bool = True
) -> Tensor:
    """Return the share of the tokens with the highest score, at least one in each scope; ties go to the lower index.

    Args:
        score: float ``[N]``.
        share: Share of the tokens, above 0 and at most 1.
        spans: The rows, with the mask of the tokens that compete.
        scope: Which rows compete with each other, or None for each by itself.
        round_up: Whether the number of tokens is rounded up rather than down.

    Returns:
        bool ``[N]``.
    """
    return select.top_k(score, select.Share(share, "up" if round_up else "down"), spans, scope)


@dataclass(frozen=True)
class top_share(Filter):
    """The share of the tokens with the highest score, at least one token. Ties go to the lower index.

    Args:
        share: Share of the tokens, above 0 and at most 1; may be a schedule.
        score: Score of each token.
        times_advantage: Whether to rank by the score times ``|advantage|``.
        per_row: Whether tokens compete in each row rather than in the whole batch.
        round_up: Whether the number of tokens is rounded up rather than down.
    """

    share: float = number(above=0, at_most=1, scheduled=True)
    score: TokenScore = part(TokenScore)
    times_advantage: bool = flag(False)
    per_row: bool = flag(False)
    round_up: bool = flag(True)

    @property
    def compares_groups(self) -> bool:
        """True unless tokens compete in each row."""
        return not self.per_row or super().compares_groups

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        assert advantages is not None
        score, spans = self.score(batch), batch.spans
        if self.times_advantage:
            size = advantages.abs()
            score = score * size if size.dim() == 1 else ops.row_product(score, size, spans)
        scope = None if self.per_row else select.everything(spans)
        return highest(score, self.share, spans, scope, self.round_up)


@dataclass(frozen=True)
class within(predicate.Recorded, Filter):
    """The tokens, or rows, where a statistic of the log-ratio between two recorded policies lies in ``[low, high]``.

    A NaN in the input ``to`` counts as a ratio of 1; a NaN in the input ``of`` lies outside. Sums and means of a row
    contain tokens that earlier filters rejected.

    Statistics are those of :func:`tokcredit.stages.within.measured`, on the input ``of`` minus the input ``to``.

    Args:
        statistic: ``ratio``, ``difference``, ``k1``, ``k2`` or ``k3``.
        over: ``token``; ``turn`` for the mean over each run of tokens that the policy chose; or how the tokens of a row
            are combined: ``sum``, ``mean``, ``max`` or ``min``.
        low: Lower bound.
        high: Upper bound.
        signs: Advantages the bounds hold for: ``any``, ``positive`` or ``negative``.
        of: Input with the log-probs of the trainer.
        to: Input with the log-probs that made the data.
    """

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        assert advantages is not None
        return self.inside(batch, advantages)


@dataclass(frozen=True)
class geo_rs(within):
    """Geometric rejection: the rows whose mean ratio ``exp(mean(log p_old - log p_engine))`` is close to 1.

    The stage is :class:`within` with the defaults of verl's preset.

    Args:
        statistic: ``ratio``; see :class:`within`.
        over: ``mean``.
        low: Lower bound of the ratio.
        high: Upper bound of the ratio.
    """

    statistic: str = option(*predicate.STATISTICS)
    over: str = option("mean", "token", "turn", "sum", "max", "min")
    low: float = number(0.999)
    high: float = number(1.001)


def from_verl(config: Any) -> tuple[Filter, ...]:
    """Return the filters of verl's ``algorithm.rollout_correction``, one for each option of ``rollout_rs``.

    The settings that make token weights are read by :func:`tokcredit.token_weights.from_verl`, and all of them, also
    those of bypass mode, by :func:`tokcredit.rollout_correction.from_verl`.

    Args:
        config: A mapping or an object with ``rollout_rs`` and ``rollout_rs_threshold``.

    Raises:
        ValueError: An option is unknown, a threshold is missing or has the wrong form, or ``bypass_mode`` is on.

    Example:
        >>> from_verl({"rollout_rs": "seq_mean_k1, token_k3", "rollout_rs_threshold": "0.99_1.01, 0.1"})
    """
    if predicate.setting(config, "bypass_mode", False):
        raise ValueError("bypass_mode: expected False, got True; use tokcredit.rollout_correction.from_verl")
    return tuple(within(*bounds) for bounds in predicate.rejections(config))


__all__ = [
    "Filter",
    "covariance",
    "from_verl",
    "geo_rs",
    "highest",
    "improbable",
    "improbable_tokens",
    "marked",
    "mixed_groups",
    "nonzero_advantage",
    "top_share",
    "within",
]
