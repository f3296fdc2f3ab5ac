"""Stages of preference objectives beside the link: what changes the score of a row, and what is added to a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokcredit import ops
from tokcredit.blocks import scan, segment
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages.base import Stage, flag, input_name, number, option, parts
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.link import Link
from tokcredit.stages.token_weights import TokenWeight


def partners(batch: Rollouts) -> Tensor:
    """Return the other row of each row's pair, int64 ``[R]``.

    Args:
        batch: Pairs.

    Raises:
        ValueError: A group is no pair.
    """
    if bool((batch.groups.sizes != 2).any()):
        raise ValueError(
            f"group_ids: expected pairs, groups of two rows, got groups of {batch.groups.sizes.tolist()[:4]}"
        )
    rows = batch.groups.sorted(torch.arange(batch.num_rows, device=batch.device)).view(-1, 2)
    return torch.empty_like(rows.view(-1)).index_copy_(0, rows.view(-1), rows.flip(1).reshape(-1))


def counterparts(batch: Rollouts) -> Tensor:
    """Return the position of the token at the same place in the other response of the pair, int64 ``[N]``.

    It is -1 for tokens beyond the end of the other response, and for masked ones.

    Args:
        batch: Pairs.

    Raises:
        ValueError: A group is no pair.
    """
    other = partners(batch)
    row_of = ops.spread(torch.arange(batch.num_rows, device=batch.device), batch.spans)
    # The tokens of all responses in one list, row after row.
    at = batch.response_mask.nonzero()[:, 0]
    at = at[row_of[at].argsort(stable=True)]
    row, first = row_of[at], batch.lengths.cumsum(0) - batch.lengths
    place = torch.arange(at.numel(), device=batch.device) - first[row]
    inside = place < batch.lengths[other[row]]
    found = torch.full_like(row_of, -1)
    return found.index_copy_(0, at[inside], at[(first[other[row]] + place)[inside]])


@dataclass(frozen=True)
class length_desensitized(TokenWeight):
    """LD-DPO's weights: 1 up to the length of the shorter response of the pair, and ``alpha`` beyond.

    Args:
        alpha: Weight of the tokens beyond, at least 0; TRL's ``ld_alpha``.

    References:
        arXiv 2409.06411.
    """

    alpha: float = number(0.5, at_least=0)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        shorter = torch.minimum(batch.lengths, batch.lengths.index_select(0, partners(batch)))
        beyond = scan.positions(batch.spans) > ops.spread(shorter, batch.spans)
        return torch.ones_like(beyond, dtype=torch.float64).masked_fill_(beyond, self.alpha)


def masked_product(a: Tensor, b: Tensor, spans: Spans) -> Tensor:
    """Return ``a * b``, and 0 at masked tokens, with a gradient to both that masked tokens cannot reach.

    Args:
        a: float ``[N]``.
        b: float ``[N]``.
        spans: The rows, with a mask.
    """
    assert spans.mask is not None
    return torch.where(spans.mask, a, 0) * torch.where(spans.mask, b, 0)


def weighing(spans: Spans, weights: Tensor | None) -> Spans:
    """Return the rows without the tokens of weight 0, whose numbers do not count, even if they are infinite or NaN.

    Args:
        spans: The rows, with a mask.
        weights: ``[R, 1]`` or ``[N]``, or None for 1.
    """
    if weights is None:
        return spans
    assert spans.mask is not None
    return spans.with_mask(spans.mask & (per_token(weights, spans) != 0))


class Transform(Stage):
    """Base of transforms of scores.

    Attributes:
        kind: ``"transform"``.
    """

    kind: ClassVar[str] = "transform"

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the transformed scores, float ``[R]``, with gradient.

        Args:
            scores: float ``[R]``, sums over the tokens of each row, before they are divided by its length.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class f_divergence(Transform):
    """Scores under another divergence from the reference policy than ``KL(policy || reference)``, as in TRL.

    With S the log-ratio of a response::

        reverse_kl     S
        forward_kl     1 - exp(-S)
        js             log 2 + log sigmoid(S)
        alpha          (exp((alpha - 1) S) - 1) / (alpha - 1)

    Exponents are at most 80, above which a response has no gradient.

    Args:
        divergence: ``reverse_kl``, ``forward_kl``, ``js`` or ``alpha``.
        alpha: The alpha of ``alpha``; within 1e-6 of 1 the score is S.

    References:
        arXiv 2309.16240.
    """

    divergence: str = option("reverse_kl", "forward_kl", "js", "alpha")
    alpha: float = number(0.5)

    def __call__(self, scores: Tensor) -> Tensor:
        if self.divergence == "js":
            return math.log(2) + functional.logsigmoid(scores)
        rate = -1.0 if self.divergence == "forward_kl" else self.alpha - 1
        if self.divergence == "reverse_kl" or abs(rate) < 1e-6:
            return scores
        exponents = rate * scores
        return exponents.where(~(exponents > 80), 80).expm1() / rate  # NaN stays, with its gradient


class Divergence(Stage):
    """Base of divergences from the reference policy in the score of a row.

    Attributes:
        kind: ``"divergence"``.
        variable: Per-token variable that ``loss`` is given by name, with gradient.
        token_weights: Factors of the tokens.
        learned_weights: Variable with further factors, or None.
    """

    kind: ClassVar[str] = "divergence"
    variable: ClassVar[str]
    token_weights: tuple[TokenWeight, ...]
    learned_weights: str | None

    def __call__(self, variables: Mapping[str, Tensor], spans: Spans, weights: Tensor | None, chosen: Tensor) -> Tensor:
        """Return what is added to the score of each row, float ``[R]``, with gradient.

        Args:
            variables: The variables of the objective by name, float ``[N]`` each.
            spans: The rows.
            weights: Product of the token weights, ``[R, 1]`` or ``[N]``, or None.
            chosen: int64 ``[P]``, the chosen rows.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class sequential_kl(Divergence):
    """The divergence from the reference policy, summed over the tokens of a row and added to its score.

    With ``KL[t] = KL(reference || policy)`` of the next-token distributions, and ``w`` the token weights::

        score[row] += strength * sum over t of w[t] * KL[t]

    ``loss`` takes the divergences by name, with their gradient: ``loss(prepared, log_probs, ref_forward_kl=...)``,
    computed by ``divergence.between(policy_logits, reference_logits, "forward_kl")``. The sum is not divided by the
    length of the row, and no transform is applied to it.

    Args:
        strength: Factor of the sum, at least 0.
        token_weights: Factors of the tokens.
        chosen_gradient: Whether the divergence of chosen rows has a gradient.
        learned_weights: Input that ``loss`` takes by name as a further factor of each token, with gradient, or None.

    References:
        arXiv 2404.11999.
    """

    variable: ClassVar[str] = "ref_forward_kl"
    strength: float = number(1.0, at_least=0)
    token_weights: tuple[TokenWeight, ...] = parts(TokenWeight)
    chosen_gradient: bool = flag(True)
    learned_weights: str | None = input_name(None, optional=True)

    def __call__(self, variables: Mapping[str, Tensor], spans: Spans, weights: Tensor | None, chosen: Tensor) -> Tensor:
        x, spans = variables[self.variable], weighing(spans, weights)
        if not self.strength:
            spans = spans.with_mask(torch.zeros_like(x, dtype=torch.bool))
        if self.learned_weights is not None:
            x = masked_product(x, variables[self.learned_weights], spans)
        total = segment.weighted_sum(x, spans, weights)
        if not self.chosen_gradient:
            total = total.index_copy(0, chosen, total.detach().index_select(0, chosen))
        return self.strength * total


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs with their scores, for terms.

    Attributes:
        batch: The rows.
        variables: ``log_probs`` and the further variables, float ``[N]`` each, with gradient.
        weights: Product of the token weights, ``[R, 1]`` or ``[N]``, or None.
        divisors: What the sum over the tokens of each row is divided by in its score; int64 ``[R]``.
        rows: int64 ``[P]`` each, the chosen and the rejected rows.
        scores: float ``[P]`` each, their scores, with gradient.
        link: Loss of a pair from its scores.
    """

    batch: Rollouts
    variables: Mapping[str, Tensor]
    weights: Tensor | None
    divisors: Tensor
    rows: tuple[Tensor, Tensor]
    scores: tuple[Tensor, Tensor]
    link: Link

    def slopes(self, constant: bool) -> tuple[Tensor, Tensor]:
        """Return the derivatives of each pair's loss to its scores, float ``[P]`` each.

        Args:
            constant: Whether they have no gradient.
        """
        constant = constant or not self.scores[0].requires_grad or not torch.is_grad_enabled()
        scores = tuple(x.detach().requires_grad_() for x in self.scores) if constant else self.scores
        with torch.enable_grad():
            loss = self.link(*scores).sum()
        of_chosen, of_rejected = torch.autograd.grad(loss, scores, create_graph=not constant)
        return of_chosen, of_rejected


class PairTerm(Stage):
    """Base of what is added to the loss of a pair.

    Attributes:
        kind: ``"pair_term"``.
        metric: Name of its metric, the mean over the pairs without the coefficient.
        variables: Variables it needs beside ``log_probs``, given to ``loss`` by name, with gradient.
        coefficient: Factor of the term.
    """

    kind: ClassVar[str] = "pair_term"
    metric: ClassVar[str]
    variables: tuple[str, ...] = ()
    coefficient: float

    def check(self, batch: Rollouts) -> None:
        """Check that the settings fit a batch; ``prepare`` calls it.

        Args:
            batch: The rows.

        Raises:
            ValueError: They do not.
        """

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return the term of each pair without the coefficient, float ``[P]``, with gradient.

        Args:
            pairs: The pairs.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class chosen_nll(PairTerm):
    """The negative log-likelihood of the chosen response, the mean over its tokens: the term of CPO and RPO.

    TRL's ``sft`` loss and ``cpo_alpha`` average over all chosen tokens of the batch instead, so that a long response
    counts more.

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller. CPO and RPO use 1.

    References:
        CPO, arXiv 2401.08417; RPO, arXiv 2404.19733.
    """

    coefficient: float = number(1.0, at_least=0, scheduled=True)
    metric: ClassVar[str] = "chosen_nll_mean"

    def __call__(self, pairs: Pairs) -> Tensor:
        rows = -segment.weighted_sum(pairs.variables["log_probs"], pairs.batch.spans)
        return (rows / pairs.batch.lengths.clamp(min=1)).index_select(0, pairs.rows[0])


class PairWeight(Stage):
    """Base of weights of pairs.

    Attributes:
        kind: ``"pair_weight"``.
        sizes: Numbers of rows that a group may have. The half with the higher rewards is chosen; its scores are added.
    """

    kind: ClassVar[str] = "pair_weight"
    sizes: ClassVar[tuple[int, ...]] = (2,)

    def __call__(self, batch: Rollouts) -> Tensor:
        """Return the weight of each group's loss, float ``[groups]``.

        Args:
            batch: The rows, in groups of these sizes.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class on_policy(PairWeight):
    """WPO's weight of a pair: how likely the policy is to write its two responses; TRL's ``use_weighting``.

    With the policy's probabilities ``p(v)`` of all tokens v, and the means over the tokens of a response::

        weight = product over both responses of exp(mean over t of (log p[t] - log sum over v of p(v)^2))

    All probabilities are those of the policy before the update, and the weight has no gradient.

    References:
        arXiv 2406.11827.
    """

    reads = frozenset({"old_log_probs", "squared_probs"})

    def __call__(self, batch: Rollouts) -> Tensor:
        aligned = batch.input("old_log_probs") - batch.input("squared_probs").log()
        of_rows, groups = segment.mean(aligned, batch.spans), batch.groups
        return of_rows.new_zeros(groups.count).index_add_(0, groups.index, of_rows).exp()


__all__ = [
    "Divergence",
    "PairTerm",
    "PairWeight",
    "Pairs",
    "Transform",
    "chosen_nll",
    "counterparts",
    "f_divergence",
    "length_desensitized",
    "masked_product",
    "on_policy",
    "partners",
    "sequential_kl",
    "weighing",
]
