"""Terms: what is added to the policy loss, each with its own denominator. KL, entropy bonus, NLL of chosen rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages.aggregation import Aggregation
from tokcredit.stages.base import Stage, flag, input_name, number, option, part
from tokcredit.stages.filters import Filter


class Term(Stage):
    """Base of terms.

    Attributes:
        kind: ``"term"``.
        metric: Name of its metric, the mean over its tokens without the coefficient.
        metric_sign: Sign of the metric relative to the term.
        after_filters: Whether it acts on tokens that pass the filters of the objective only.
        variables: Per-token variables it needs beside ``log_probs``, given to ``loss`` by name, with gradient.
        coefficient: Factor of the term.
        aggregation: How its tokens are averaged, or None for the aggregation of the objective.
        where: Filter of the tokens it acts on, or None for all that train.
        over_all: Whether the average is over all tokens that train, also those that ``where`` rejects.
    """

    kind: ClassVar[str] = "term"
    metric: ClassVar[str] = ""
    metric_sign: ClassVar[float] = 1.0
    after_filters: ClassVar[bool] = True
    variables: ClassVar[frozenset[str]] = frozenset()
    coefficient: float
    aggregation: Aggregation | None = None
    where: Filter | None = None
    over_all: bool = False

    @property
    def couples_tokens(self) -> bool:
        """Whether the derivative at a token depends on variables of other tokens. True unless a class says no."""
        return True

    def __call__(self, variables: Mapping[str, Tensor], batch: Rollouts, spans: Spans, weights: Tensor) -> Tensor:
        """Return the weighted sum over tokens, 0-d and without the coefficient, with its gradient.

        Args:
            variables: ``log_probs`` and the further variables, ``[N]`` each.
            batch: The rollouts.
            spans: The rows, with the mask of the tokens the term acts on.
            weights: float ``[R, 1]`` or 0-d, from the aggregation.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class kl(Term):
    """An estimate of the KL divergence from the reference policy, per token.

    With ``u = log p - log p_ref``, held within 20 nats, beyond which a token has no gradient::

        k1            u
        k2            u^2 / 2
        k3            exp(-u) + u - 1
        abs           |u|
        k3_corrected  q (exp(-u) + u - 1)

    The gradient of k2 is an unbiased estimate of the gradient of the KL if the tokens come from the current policy.
    ``k3_corrected``, whose gradient is ``q u``, is unbiased also if they come from the old one: ``q = p / p_old``, with
    the value 1 in a batch without ``old_log_probs``. k3 is never negative and has low variance.

    The metric is ``kl``, or ``kl_old`` and the like where ``to`` is not ``ref_log_probs``.

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
        estimator: ``k3``, ``k1``, ``k2``, ``abs`` or ``k3_corrected``.
        to: Input with the log-probs of the reference policy.
        limit: Largest estimate of a token, nats. A token with a larger estimate counts as this much and has no
            gradient. verl uses 10 for its ``low_var_kl``.
        aggregation: How tokens are averaged, or None for the aggregation of the objective.
        where: Filter of the tokens it acts on, or None for all that train.
        over_all: Whether the average is over all tokens that train, also those that ``where`` rejects.
    """

    coefficient: float = number(0.001, at_least=0, scheduled=True)
    estimator: str = option("k3", "k1", "k2", "abs", "k3_corrected")
    to: str = input_name("ref_log_probs")
    limit: float = number(math.inf, above=0, infinite=True)
    aggregation: Aggregation | None = part(Aggregation, None, optional=True)
    where: Filter | None = part(Filter, None, optional=True)
    over_all: bool = flag(False)

    @property
    def metric(self) -> str:  # type: ignore[override] # a class variable in the base
        """``kl``, with the name of the policy where it is not the reference."""
        return "kl" if self.to == "ref_log_probs" else f"kl_{self.to.removesuffix('_log_probs')}"

    @property
    def required_inputs(self) -> frozenset[str]:
        """The input that ``to`` names."""
        return super().required_inputs | {self.to}

    couples_tokens = False

    def __call__(self, variables: Mapping[str, Tensor], batch: Rollouts, spans: Spans, weights: Tensor) -> Tensor:
        log_probs, log_ratio = variables["log_probs"], None
        if self.estimator == "k3_corrected" and batch.old_log_probs is not None:
            rounded = torch.promote_types(log_probs.dtype, torch.float32)
            log_ratio = (log_probs.detach().to(rounded) - batch.old_log_probs).clamp_(-20.0, 20.0)
        total, _ = ops.policy_loss(
            log_probs,
            spans,
            self.estimator,
            reference=batch.input(self.to),
            log_ratio=log_ratio,
            weights=weights,
            clamp=(-20.0, 20.0),
            limit=self.limit,
            total=True,
        )
        return total


@dataclass(frozen=True)
class entropy(Term):
    """A bonus for entropy: minus the mean entropy of the current policy.

    ``loss`` takes the entropies by name, with their gradient: ``loss(prepared, log_probs, entropies=...)``.

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
        aggregation: How tokens are averaged, or None for the aggregation of the objective.
    """

    coefficient: float = number(0.001, at_least=0, scheduled=True)
    aggregation: Aggregation | None = part(Aggregation, None, optional=True)
    metric: ClassVar[str] = "entropy_bonus"
    metric_sign: ClassVar[float] = -1.0
    variables: ClassVar[frozenset[str]] = frozenset({"entropies"})

    couples_tokens = False

    def __call__(self, variables: Mapping[str, Tensor], batch: Rollouts, spans: Spans, weights: Tensor) -> Tensor:
        return segment.weighted_sum(variables["entropies"], spans, -weights, total=True)


@dataclass(frozen=True)
class nll(Term):
    """Negative log-likelihood of some rows or tokens, for example of the correct rows.

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
        where: Filter of the rows or tokens it acts on, or None for all that train.
        aggregation: How tokens are averaged, or None for the aggregation of the objective.
    """

    coefficient: float = number(0.1, at_least=0, scheduled=True)
    where: Filter | None = part(Filter, None, optional=True)
    aggregation: Aggregation | None = part(Aggregation, None, optional=True)
    metric: ClassVar[str] = "nll"

    couples_tokens = False

    def __call__(self, variables: Mapping[str, Tensor], batch: Rollouts, spans: Spans, weights: Tensor) -> Tensor:
        return segment.weighted_sum(variables["log_probs"], spans, -weights, total=True)


@dataclass(frozen=True)
class value(Term):
    """The loss of a critic: half the squared error of its values, held where they moved far from the old ones.

    With ``V`` the current values, ``V_old`` the input ``values`` and ``G`` the input ``value_targets``::

        loss = max((V - G)^2, (clip(V, V_old - limit, V_old + limit) - G)^2) / 2

    Of equal squares the first counts. ``loss`` takes the values by name, with their gradient:
    ``loss(prepared, log_probs, values=...)``. The targets are ``credit.gae.targets(batch)``.

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
        limit: How far a value may move from the old one before its gradient ends, above 0. TRL uses 0.2, verl 0.5.
        aggregation: How tokens are averaged, or None for the aggregation of the objective.
    """

    coefficient: float = number(1.0, at_least=0, scheduled=True)
    limit: float = number(0.2, above=0, infinite=True)
    aggregation: Aggregation | None = part(Aggregation, None, optional=True)
    metric: ClassVar[str] = "value_loss"
    variables: ClassVar[frozenset[str]] = frozenset({"values"})
    reads: ClassVar[frozenset[str]] = frozenset({"values", "value_targets"})

    couples_tokens = False

    def __call__(self, variables: Mapping[str, Tensor], batch: Rollouts, spans: Spans, weights: Tensor) -> Tensor:
        assert spans.mask is not None
        current, old, target = (
            torch.where(spans.mask, x, 0)
            for x in (variables["values"], batch.input("values"), batch.input("value_targets"))
        )
        free = (current - target).square()
        held = (old + (current - old).clamp(-self.limit, self.limit) - target).square()
        return segment.weighted_sum(torch.where(held > free, held, free) / 2, spans, weights).sum()


__all__ = ["Term", "entropy", "kl", "nll", "value"]
