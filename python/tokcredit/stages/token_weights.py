"""Token weights: factors of the token losses, decided once per batch. They do not change denominators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import within as predicate
from tokcredit.stages.base import Stage, flag, input_name, number, option, part
from tokcredit.stages.token_score import TokenScore


class TokenWeight(Stage):
    """Base of token weights.

    Attributes:
        kind: ``"token_weight"``.
    """

    kind: ClassVar[str] = "token_weight"

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        """Return the weights.

        Args:
            batch: The rollouts. Tokens that filters rejected are False in its response mask.
            advantages: float ``[R, 1]`` or ``[N]``.

        Returns:
            float ``[R, 1]`` or ``[N]``.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class importance(TokenWeight):
    """The ratio ``p_old / p_engine``, bounded: a correction of rollouts whose engine has other probabilities.

    With ``y = log p_old - log p_engine``, 0 where the engine did not report a log-prob (NaN)::

        w = exp(y), or exp of the sum or mean of y over the row or the turn, with the exponent held within 20 nats
        w = clip(w, low, high)                    with outside="clamp"
        w = w if low <= w <= high else 0          with outside="zero"
        w = w / mean(w)                           with normalize

    Sums and means contain tokens that filters rejected, as the ratio of the whole row does, also with normalize. A turn
    is a maximal run of tokens that the policy chose.

    :class:`tis`, :class:`mis` and :class:`icepop` are this stage with the settings of those methods.

    Args:
        over: ``token`` for the token's own ratio, ``sum`` for that of the whole row, ``mean`` for its geometric mean,
            ``turn`` for the geometric mean of the turn.
        low: Smallest weight, at least 0.
        high: Largest weight, above 0.
        outside: ``clamp`` or ``zero``.
        normalize: Whether weights are divided by their mean over the tokens of the batch that the policy chose, or over
            its rows if there is one weight per row; not if the mean is at most 1e-8.
        of: Input with the log-probs of the trainer.
        to: Input with the log-probs of the engine.

    Raises:
        ValueError: ``low`` exceeds ``high``.
    """

    over: str = option("token", "sum", "mean", "turn")
    low: float = number(0.0, at_least=0)
    high: float = number(2.0, above=0, infinite=True)
    outside: str = option("clamp", "zero")
    normalize: bool = flag(False)
    of: str = input_name("old_log_probs")
    to: str = input_name("rollout_log_probs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(f"token_weight.importance: low: expected at most high, {self.high}, got {self.low}")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The two inputs that are compared."""
        return frozenset({self.of, self.to})

    @property
    def compares_groups(self) -> bool:
        """Whether weights are divided by their mean over the batch."""
        return self.normalize

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        y = predicate.log_ratio(batch.input(self.of), batch.input(self.to))
        spans = batch.policy_spans
        if self.over == "turn":
            y = predicate.turn_mean(y, spans)
        elif self.over != "token":
            y = (segment.sum if self.over == "sum" else segment.mean)(y, spans)[:, None]
        assert spans.mask is not None
        if y.dim() == 1:
            y = y.masked_fill_(~spans.mask, 0)
        ratio = y.clamp(-20, 20).exp()
        if self.outside == "clamp":
            weights = ratio.clamp(self.low, self.high)
        else:
            weights = torch.where((ratio < self.low) | (ratio > self.high), 0, ratio)
        if self.normalize:
            counted = spans.mask if y.dim() == 1 else segment.count(spans) > 0
            mean = segment.mean(weights.view(-1), Spans.single(counted.numel(), batch.device, counted))
            weights = weights / torch.where(mean > 1e-8, mean, 1)
        return weights


@dataclass(frozen=True)
class tis(importance):
    """Truncated importance sampling: ``min(p_old / p_engine, high)`` of each token, as in verl and slime.

    The stage is :class:`importance` with its own defaults.
    """


@dataclass(frozen=True)
class mis(importance):
    """Masked importance sampling: the ratio of the whole row where it is at most ``high``, else 0, as in TRL.

    The stage is :class:`importance` with other defaults.

    Args:
        over: ``sum``, the ratio of the whole row.
        high: Largest ratio.
        outside: ``zero``.
    """

    over: str = option("sum", "token", "mean", "turn")
    high: float = number(3.0, above=0, infinite=True)
    outside: str = option("zero", "clamp")


@dataclass(frozen=True)
class icepop(importance):
    """IcePop: the ratio of each token where it lies in ``[low, high]``, else 0, as in slime, NeMo-RL and OpenRLHF.

    The stage is :class:`importance` with other defaults.

    Args:
        low: Smallest ratio that counts.
        high: Largest ratio that counts.
        outside: ``zero``.
    """

    low: float = number(0.5, at_least=0)
    high: float = number(5.0, at_least=1, infinite=True)
    outside: str = option("zero", "clamp")


def from_verl(config: Any) -> tuple[TokenWeight, ...]:
    """Return the token weight of verl's ``algorithm.rollout_correction``, or nothing if ``rollout_is`` is None.

    The settings that reject tokens and rows are read by :func:`tokcredit.filters.from_verl`.

    Args:
        config: A mapping or an object with ``rollout_is``, ``rollout_is_threshold`` and ``rollout_is_batch_normalize``.

    Raises:
        ValueError: A setting has no such value.
    """
    level = predicate.setting(config, "rollout_is", None)
    threshold = predicate.setting(config, "rollout_is_threshold", 2.0)
    if predicate.setting(config, "bypass_mode", False):
        raise ValueError("bypass_mode: expected False, got True; use tokcredit.rollout_correction.from_verl")
    if level is None or threshold is None:
        return ()
    if level not in ("token", "sequence"):
        raise ValueError(f"rollout_is: expected token, sequence or None, got {level!r}")
    low, high = predicate.thresholds(threshold)
    outside = "clamp" if low is None else "zero"
    normalize = bool(predicate.setting(config, "rollout_is_batch_normalize", False))
    return (importance("token" if level == "token" else "sum", low or 0.0, high, outside, normalize),)


def from_trl(config: Any) -> tuple[TokenWeight, ...]:
    """Return the token weight of the settings ``vllm_importance_sampling_*`` of TRL's ``GRPOConfig``.

    Args:
        config: A mapping or an object with ``vllm_importance_sampling_correction``, ``_mode``, ``_clip_max`` and
            ``_clip_min``, whose defaults are those of TRL: True, ``sequence_mask``, 3.0 and None.

    Raises:
        ValueError: The mode is unknown.
    """
    name = "vllm_importance_sampling_"
    if not predicate.setting(config, f"{name}correction", True):
        return ()
    mode = predicate.setting(config, f"{name}mode", "sequence_mask")
    level, _, action = str(mode).partition("_")
    if level not in ("token", "sequence") or action not in ("mask", "truncate"):
        raise ValueError(f"{name}mode: expected token or sequence, then _mask or _truncate, got {mode!r}")
    low, high = (predicate.setting(config, f"{name}clip_{end}", x) for end, x in (("min", None), ("max", 3.0)))
    over, outside = "token" if level == "token" else "sum", "zero" if action == "mask" else "clamp"
    return (importance(over, low or 0.0, math.inf if high is None else high, outside),)


@dataclass(frozen=True)
class within(predicate.Recorded, TokenWeight):
    """1 where a statistic of the log-ratio between two recorded policies lies in ``[low, high]``, else 0.

    A NaN in the input ``to`` counts as a ratio of 1. Sums and means of a row contain tokens that filters rejected.

    The same predicate as :class:`tokcredit.filters.within`, without changing a denominator.

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

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        of, to = batch.input(self.of), batch.input(self.to)
        return self.inside(batch, advantages).to(torch.promote_types(of.dtype, to.dtype))


@dataclass(frozen=True)
class raised(TokenWeight):
    """``1 + strength * score``.

    Args:
        score: Score of each token.
        strength: Factor of the score.
    """

    score: TokenScore = part(TokenScore)
    strength: float = number()

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return 1 + self.strength * self.score(batch)


@dataclass(frozen=True)
class scored(TokenWeight):
    """A score as it is.

    Args:
        score: Score of each token.
    """

    score: TokenScore = part(TokenScore)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return self.score(batch)


def _turns(batch: Rollouts) -> tuple[Spans, Tensor, Tensor]:
    """Return the turns with the mask of the tokens that train, how many each has, and how many such turns a row."""
    spans = batch.turns.spans.with_mask(batch.spans.mask)
    tokens = ops.count(spans)
    return spans, tokens, ops.count(batch.turns.of_row(tokens > 0))


@dataclass(frozen=True)
class turn_mean(TokenWeight):
    """``L / (K * l)``, with which all turns of a trajectory have the same weight.

    L is the number of tokens of the trajectory that train, K the number of turns with such tokens, and l the number of
    such tokens in the token's own turn. With ``aggregation.sequence_mean`` the loss is the mean over trajectories of
    the mean over turns of the mean over tokens.
    """

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        spans, tokens, counts = _turns(batch)
        row = batch.turns.row
        weight = batch.lengths[row] / (counts[row] * tokens).clamp(min=1).double()
        return ops.spread(weight.to(advantages.dtype), spans)


@dataclass(frozen=True)
class turn_count(TokenWeight):
    """``mean(K) / K``, which divides token losses by the number of turns of their trajectory.

    K is the number of turns of the trajectory with tokens that train, and ``mean(K)`` its mean over the trajectories of
    the batch. With ``aggregation.token_mean`` the loss is ``1/J * sum over the trajectories of (sum of token losses) /
    (K * c)``, with J trajectories and c the mean number of tokens in a turn of the batch.
    """

    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        counts = _turns(batch)[2].double()
        mean = counts.sum() / (counts > 0).sum().clamp(min=1)
        return (mean / counts.clamp(min=1)).to(advantages.dtype)[:, None]


__all__ = [
    *("TokenWeight", "from_trl", "from_verl", "icepop", "importance", "mis", "raised", "scored", "tis"),
    *("turn_count", "turn_mean", "within"),
]
