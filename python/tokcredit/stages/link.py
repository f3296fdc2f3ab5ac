"""Links: the loss of a preference pair from the scores of its two rows; TRL's ``loss_type``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokcredit import ops
from tokcredit.ops import LinkTerm
from tokcredit.stages.base import Stage, number, part


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

    def total(
        self, scores: Tensor, pairs: Tensor, divisors: Tensor | None, weights: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of all pairs, its derivative to each score, and loss and scores of each pair.

        A pair whose loss is NaN, as infinity minus infinity or 0 times infinity is, has NaN derivatives.

        Args:
            scores: float ``[J]``, without gradient.
            pairs: int64 ``[P, 2]``, the chosen and the rejected row of each pair.
            divisors: int64 ``[J]``, what each score is divided by, 0 counting as 1, or None.
            weights: float64 ``[P]``, weights of the pairs, or None.
            scale: Factor of the loss.

        Returns:
            0-d, ``[J]`` and ``[P, 3]`` or more columns: loss, score of the chosen and of the rejected row.
        """
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            chosen, rejected = (leaf if divisors is None else leaf / divisors.clamp(min=1))[pairs].unbind(1)
            losses = self(chosen, rejected)
            total = (losses if weights is None else losses * weights.to(losses.dtype)).sum() * scale
        slopes = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(scores)
        undefined = losses.detach().isnan().repeat_interleave(2)
        slopes.index_fill_(0, pairs.reshape(-1)[undefined], math.nan)
        return total.detach(), slopes, torch.stack([losses, chosen, rejected], 1).detach()


class TermLink(Link):
    """Base of links that are a sum of functions of the scores; one native operation computes value and derivatives."""

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """The functions, at most four; see ``csrc/ops/pair_link.hpp``."""
        raise NotImplementedError

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ops.pair_losses(chosen, rejected, self.terms)

    def total(
        self, scores: Tensor, pairs: Tensor, divisors: Tensor | None, weights: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as the base.

        Args:
            scores: As in the base.
            pairs: As in the base.
            divisors: As in the base.
            weights: As in the base.
            scale: As in the base.
        """
        return ops.pair_link(scores, self.terms, pairs, divisors, weights, scale)


@dataclass(frozen=True)
class logistic(TermLink):
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

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """``-log sigmoid`` of the scaled difference, and of the opposite with label smoothing."""
        b, e = self.beta, self.label_smoothing
        right = LinkTerm("logistic", 1 - e, b, -b, -self.margin)
        return (right, LinkTerm("logistic", e, -b, b, self.margin)) if e else (right,)


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
class robust(TermLink):
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

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """``-log sigmoid`` of the scaled difference and of the opposite."""
        b, e = self.beta, self.label_smoothing
        right = LinkTerm("logistic", (1 - e) / (1 - 2 * e), b, -b)
        return (right, LinkTerm("logistic", -e / (1 - 2 * e), -b, b)) if e else (right,)


@dataclass(frozen=True)
class squared(TermLink):
    """IPO's ``(chosen - rejected - 1 / (2 beta))^2``.

    Args:
        beta: Strength of the regularization, above 0: the wanted difference of the scores is ``1 / (2 beta)``.

    References:
        arXiv 2310.12036.
    """

    beta: float = number(0.1, above=0)

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """The square."""
        return (LinkTerm("square", 1, 1, -1, -0.5 / self.beta),)


@dataclass(frozen=True)
class hinge(TermLink):
    """``max(0, 1 - beta * (chosen - rejected))``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2305.10425.
    """

    beta: float = number(0.1, above=0)

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """What is missing to a scaled difference of 1."""
        return (LinkTerm("hinge", 1, -self.beta, self.beta, 1),)


@dataclass(frozen=True)
class exo_pair(TermLink):
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

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """Those of the right order and of the wrong one."""
        b, e = self.beta, self.label_smoothing
        right = LinkTerm("entropy", 1, b, -b, parameter=math.log1p(-e))
        return right, LinkTerm("entropy", 1, -b, b, parameter=math.log(e))


@dataclass(frozen=True)
class nca_pair(TermLink):
    """NCA: ``-log sigmoid(beta * chosen) - (log sigmoid(-beta * chosen) + log sigmoid(-beta * rejected)) / 2``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2402.05369.
    """

    beta: float = number(0.1, above=0)

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """One of the chosen score, and half of one that lowers each score."""
        b = self.beta
        lowered = LinkTerm("logistic", 0.5, -b, 0), LinkTerm("logistic", 0.5, 0, -b)
        return (LinkTerm("logistic", 1, b, 0), *lowered)


@dataclass(frozen=True)
class bco_pair(TermLink):
    """BCO without a running mean: ``-log sigmoid(beta * chosen) - log sigmoid(-beta * rejected)``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2404.04656.
    """

    beta: float = number(0.1, above=0)

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """One of each score."""
        return LinkTerm("logistic", 1, self.beta, 0), LinkTerm("logistic", 1, 0, -self.beta)


@dataclass(frozen=True)
class sppo_hard(TermLink):
    """SPPO with certain labels: ``(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2``.

    Args:
        beta: Strength of the regularization, above 0.

    References:
        arXiv 2405.00675.
    """

    beta: float = number(0.1, above=0)

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """One square of each score."""
        return LinkTerm("square", 1, 1, 0, -0.5 / self.beta), LinkTerm("square", 1, 0, 1, 0.5 / self.beta)


@dataclass(frozen=True)
class apo_zero(TermLink):
    """APO for a policy worse than the chosen responses: ``1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2408.06266.
    """

    beta: float = number(0.1, above=0)

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """``sigmoid(-beta * chosen) + sigmoid(beta * rejected)``, which is the same."""
        return LinkTerm("sigmoid", 1, -self.beta, 0), LinkTerm("sigmoid", 1, 0, self.beta)


@dataclass(frozen=True)
class apo_down(TermLink):
    """APO for a policy better than the chosen responses, which it makes less likely, but the rejected ones more so.

    ``sigmoid(beta * chosen) + 1 - sigmoid(beta * (chosen - rejected))``.

    Args:
        beta: Strength of the preference, above 0.

    References:
        arXiv 2408.06266.
    """

    beta: float = number(0.1, above=0)

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """``sigmoid(beta * chosen) + sigmoid(-beta * (chosen - rejected))``, which is the same."""
        return LinkTerm("sigmoid", 1, self.beta, 0), LinkTerm("sigmoid", 1, -self.beta, self.beta)


@dataclass(frozen=True)
class discopop(TermLink):
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

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """The mixture."""
        return (LinkTerm("blend", 1, self.beta, -self.beta, parameter=self.tau),)


@dataclass(frozen=True)
class both(Link):
    """The weighted sum of two links, ``first_weight * first + second_weight * second``: TRL's ``loss_weights``.

    Args:
        first: A link.
        second: Another link, for the same scores: both for sums over tokens, or both for means.
        first_weight: Factor of the first, at least 0.
        second_weight: Factor of the second, at least 0.

    References:
        MPO, arXiv 2411.10442. Its third loss is ``pair.chosen_nll``.
    """

    first: Link = part(Link, logistic)
    second: Link = part(Link, bco_pair)
    first_weight: float = number(1.0, at_least=0)
    second_weight: float = number(1.0, at_least=0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        weighted = ((self.first, self.first_weight), (self.second, self.second_weight))
        # 0 times an infinite loss is NaN.
        losses = [weight * link(chosen, rejected) for link, weight in weighted if weight]
        return sum(losses, torch.zeros_like(chosen))


__all__ = [
    "Link",
    "TermLink",
    "alpha_logistic",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "both",
    "discopop",
    "exo_pair",
    "hinge",
    "logistic",
    "nca_pair",
    "robust",
    "sppo_hard",
    "squared",
]
