"""One predicate over log-ratios, which serves filters, token weights and advantage scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages.base import input_name, number, option

STATISTICS = ("ratio", "difference", "k1", "k2", "k3")
OVER = ("token", "turn", "sum", "mean", "max", "min")
SIGNS = ("any", "positive", "negative")


def log_ratio(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return ``log_probs - reference``, and 0 where the reference is NaN: an engine did not report the token.

    Args:
        log_probs: float ``[N]``.
        reference: float ``[N]``.
    """
    wide = log_probs.float() if log_probs.dtype.itemsize < 4 else log_probs
    return (wide - reference).masked_fill_(reference.isnan(), 0)


def thresholds(given: str | float) -> tuple[float | None, float]:
    """Return the lower and upper bound that verl writes as one number or as ``"low_high"``.

    Args:
        given: A number, its text, or two numbers joined by ``_``.

    Raises:
        ValueError: It is neither.
    """
    texts = str(given).split("_")
    try:
        found = [float(x) for x in texts]
    except ValueError:
        found = []
    if len(found) not in (1, 2) or not all(x > 0 for x in found) or found != sorted(found):
        raise ValueError(f"threshold: expected a number above 0 or two ascending ones joined by _, got {given!r}")
    return (None, found[0]) if len(found) == 1 else (found[0], found[1])


def setting(config: Any, name: str, default: Any) -> Any:
    """Return a setting of a host's configuration, a mapping or an object.

    Args:
        config: The configuration.
        name: Name of the setting.
        default: Its value where the configuration has none.
    """
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def rejections(config: Any) -> tuple[tuple[str, str, float, float], ...]:
    """Return the statistic, ``over`` and the bounds of each option of verl's ``rollout_rs``.

    Args:
        config: A mapping or an object with ``rollout_rs`` and ``rollout_rs_threshold``.

    Raises:
        ValueError: An option is unknown, or a threshold is missing or has the wrong form.
    """
    wanted = setting(config, "rollout_rs", None)
    if not wanted:
        return ()
    names = list(dict.fromkeys(x.strip() for x in wanted.split(",") if x.strip()))
    given = setting(config, "rollout_rs_threshold", None)
    texts = [x.strip() for x in given.split(",")] if isinstance(given, str) else [given]
    texts = texts * len(names) if len(texts) == 1 else texts
    if given is None or len(texts) != len(names):
        raise ValueError(f"rollout_rs_threshold: expected one threshold, or one for each of {names}, got {given!r}")
    return tuple(_rejection(name, threshold) for name, threshold in zip(names, texts, strict=True))


def _rejection(name: str, threshold: str | float) -> tuple[str, str, float, float]:
    over, _, statistic = name.removeprefix("seq_").rpartition("_")
    known = over in ("token", "sum", "mean", "max") and statistic in ("k1", "k2", "k3")
    if not known or (over == "token") == name.startswith("seq_") or (over, statistic) == ("max", "k1"):
        raise ValueError(
            f"rollout_rs: expected token_k1, seq_sum_k2, seq_mean_k3, seq_max_k2 or the like, got {name!r}"
        )
    low, high = thresholds(threshold)
    if statistic != "k1":
        if low is not None:
            raise ValueError(f"rollout_rs_threshold: expected one number for {name}, got {threshold!r}")
        return statistic, over, -math.inf, high
    # verl compares log p_engine - log p_old, so the bounds hold for the inverse of the ratio.
    return "ratio", over, 1 / high, 1 / (1 / high if low is None else low)


def turn_mean(x: Tensor, spans: Spans) -> Tensor:
    """Return the mean over the turn of each token; a turn is a maximal run of unmasked tokens of a row.

    Nothing waits for the device, unlike with :func:`tokcredit.blocks.segment.runs`.

    Args:
        x: float ``[N]``.
        spans: The rows, with the mask of the tokens that the policy chose.

    Returns:
        float ``[N]``; its value at masked tokens means nothing.
    """
    inside = ops.spread(torch.ones_like(spans.begin, dtype=torch.bool), spans)
    first = torch.zeros(spans.size + 1, dtype=torch.bool, device=spans.device)
    first[1:] = ~inside
    first.index_fill_(0, spans.begin, True)
    number = (inside & first[:-1]).cumsum(0) - 1
    turns = segment.Ids(number, spans.size, inside)
    return segment.mean(x, turns).index_select(0, number.clamp_(min=0)) if spans.size else x


def measured(log_ratio: Tensor, spans: Spans, statistic: str, over: str) -> Tensor:
    """Return a statistic of the log-ratios.

    With ``x`` the log-ratio of a token::

        ratio       exp(x); over turn, sum or mean, exp of the mean or sum of x
        difference  x
        k1          -x
        k2          x^2 / 2
        k3          exp(x) - 1 - x

    Args:
        log_ratio: float ``[N]``.
        spans: The rows, with the mask of the tokens that count.
        statistic: One of :data:`STATISTICS`.
        over: ``token`` for each token by itself, ``turn`` for the mean over its turn, else how the tokens of a row are
            combined.

    Returns:
        float ``[N]`` over tokens and turns, else ``[R, 1]``.
    """
    x = log_ratio
    if statistic == "k1":
        x = -x
    elif statistic == "k2":
        x = x.square() / 2
    elif statistic == "k3":
        x = x.expm1() - x
    if over == "turn":
        x = turn_mean(x, spans)
    elif over != "token":
        reduce = {"sum": segment.sum, "mean": segment.mean, "max": segment.maximum, "min": segment.minimum}[over]
        x = reduce(x, spans)[:, None]
    return x.exp() if statistic == "ratio" else x


def of_sign(signs: str, advantages: Tensor, inside: Tensor, spans: Spans) -> Tensor:
    """Return the predicate where advantages have a sign, and True elsewhere.

    Args:
        signs: One of :data:`SIGNS`.
        advantages: float ``[R, 1]`` or ``[N]``.
        inside: bool ``[R, 1]`` or ``[N]``.
        spans: The rows.

    Returns:
        bool ``[R, 1]`` if both are per row, else ``[N]``.
    """
    if signs == "any":
        return inside
    free = advantages <= 0 if signs == "positive" else advantages >= 0
    if free.dim() == inside.dim():
        return inside | free
    per_token = [x if x.dim() == 1 else ops.spread(x[:, 0], spans) for x in (inside, free)]
    return torch.logical_or(*per_token)


@dataclass(frozen=True)
class Recorded:
    """The predicate on the log-ratio between two recorded policies, for the stages that read no current policy.

    Args:
        statistic: One of :data:`STATISTICS`.
        over: One of :data:`OVER`.
        low: Lower bound.
        high: Upper bound.
        signs: One of :data:`SIGNS`; advantages the bounds hold for.
        of: Input with the log-probs of the trainer.
        to: Input with the log-probs that made the data.
    """

    statistic: str = option(*STATISTICS)
    over: str = option(*OVER)
    low: float = number(-math.inf, infinite=True)
    high: float = number(math.inf, infinite=True)
    signs: str = option(*SIGNS)
    of: str = input_name("old_log_probs")
    to: str = input_name("rollout_log_probs")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The two inputs that are compared."""
        return frozenset({self.of, self.to})

    def inside(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        """Return whether the statistic lies in ``[low, high]``; True where the advantage has another sign.

        A NaN log-ratio lies outside; see :func:`log_ratio` for tokens without a reference.

        Args:
            batch: The rollouts.
            advantages: float ``[R, 1]`` or ``[N]``.

        Returns:
            bool ``[R, 1]`` over rows or ``[N]`` over tokens.
        """
        difference = log_ratio(batch.input(self.of), batch.input(self.to))
        x = measured(difference, batch.policy_spans, self.statistic, self.over)
        return of_sign(self.signs, advantages, (x >= self.low) & (x <= self.high), batch.spans)
