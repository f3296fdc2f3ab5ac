"""Token-level Adaptive Barrier Preference Optimization."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.preference import Preference
from tokcredit.prepared import multiplied
from tokcredit.rollouts import Rollouts
from tokcredit.stages.base import number, parts
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import Pairs, PairTerm, counterparts, weighing
from tokcredit.stages.token_score import given
from tokcredit.stages.token_weights import TokenWeight, scored

_FIELDS = {"Code": 1.1, "Sub-?code": 1.2, "Span": 1.1}


def field_weights(answer: str, offsets: Sequence[tuple[int, int]]) -> list[float]:
    """Return the ``field_weights`` of the tokens of an answer: 1.1 in a code or a span, 1.2 in a sub-code, else 1.

    The values of ``"Code"``, ``"Sub-code"`` or ``"Subcode"``, and ``"Span"`` are read from the answer, up to the next
    double quote. A token that overlaps an occurrence of a value anywhere in the answer has the factor of its field, the
    largest one if there are several.

    Args:
        answer: Text of the response, JSON.
        offsets: First character of each token in it, and one past the last. Tokens behind the answer have 1.
    """
    weights = [1.0] * len(offsets)
    for field, factor in _FIELDS.items():
        for value in set(re.findall(rf'"{field}"\s*:\s*"([^"]+)"', answer)):
            for found in re.finditer(f"(?={re.escape(value)})", answer):
                first, last = found.start(), found.start() + len(value)
                for t, (begin, end) in enumerate(offsets):
                    if begin < last and first < end:
                        weights[t] = max(weights[t], factor)
    return weights


@dataclass(frozen=True)
class differing(TokenWeight):
    """A factor of tokens that differ from the token of the other row of the pair at the same place in its response.

    Places are counted in tokens of the response, so that after an insertion nearly all tokens differ. Tokens beyond the
    end of the shorter response have 1.

    Args:
        factor: The factor, at least 0.
    """

    factor: float = number(1.2, at_least=0)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        other = counterparts(batch)
        differs = (other >= 0) & (batch.tokens != batch.tokens[other])
        return torch.ones_like(other, dtype=torch.float64).masked_fill_(differs, self.factor)


@dataclass(frozen=True)
class unit_mean(TokenWeight):
    """The product of other token weights, divided by its mean over the row; 0 in a row of zeros.

    Args:
        of: The other token weights.
    """

    of: tuple[TokenWeight, ...] = parts(TokenWeight)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        weights = multiplied(self.of, batch, advantages)
        if weights is None:
            return torch.ones_like(batch.rewards)[:, None]
        x = per_token(weights, batch.spans)
        return x * ops.spread(batch.lengths / segment.sum(x, batch.spans).clamp(min=1e-6), batch.spans).to(x.dtype)


@dataclass(frozen=True)
class barrier(PairTerm):
    """Negative log-likelihood of the tokens of chosen responses that the policy finds improbable.

    With the token weights ``w`` of the objective, 1 without any, and the gate ``g = 1[log p < log threshold]``, which
    has no gradient::

        barrier = sum of w * g * (-log p) / max(1, sum of w * g)          over the tokens of the chosen response

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
        threshold: Probability below which a token counts, at least 0; above 1 every token counts.
    """

    coefficient: float = number(0.5, at_least=0, scheduled=True)
    threshold: float = number(0.66, at_least=0)
    metric = "barrier_mean"

    def gate(self, log_probs: Tensor) -> Tensor:
        """Return which tokens count, bool ``[N]``, if they are of a chosen response.

        Args:
            log_probs: float ``[N]``.
        """
        return log_probs.detach() < (math.log(self.threshold) if self.threshold else -math.inf)

    def __call__(self, pairs: Pairs) -> Tensor:
        log_probs, spans = pairs.variables["log_probs"], pairs.batch.spans
        weights = torch.ones_like(log_probs) if pairs.weights is None else per_token(pairs.weights, spans)
        spans = weighing(spans.with_mask(pairs.batch.response_mask & self.gate(log_probs)), weights)
        total = -segment.weighted_sum(log_probs, spans, weights)
        return (total / segment.sum(weights, spans).clamp(min=1)).index_select(0, pairs.rows[0])


def tab_po(
    beta: float = 0.5,
    tau: float = 0.66,
    barrier_weight: float = 0.5,
    variant: Literal["v2", "v1"] = "v2",
) -> Preference:
    """TAB-PO: DPO against the SFT policy, and a barrier that keeps improbable tokens of the chosen response likely.

    It suits pairs that differ in few tokens. With ``g = 1[p < tau]`` on chosen tokens, without gradient::

        S = sum over the tokens of a response of log p - log p_ref
        barrier = sum of g * (-log p) / max(1, sum of g)                      over the tokens of the chosen response
        loss = mean over pairs of -log sigmoid(beta * (S[chosen] - S[rejected])) + barrier_weight * barrier

    With ``variant="v1"`` tokens have weights, also in the barrier, and ``S`` is a weighted mean. A weight is the
    token's ``field_weights``, times 1.2 where the other response has another token at the same place, divided by the
    mean over the response. The trainer computes weights of fields; elsewhere, ``from tokcredit.methods.tab_po import
    field_weights``.

    Args:
        beta: Strength of the preference, above 0.
        tau: Probability below which a chosen token counts in the barrier, at least 0.
        barrier_weight: Factor of the barrier, at least 0: the paper's lambda.
        variant: ``v2``, the second version of the paper, or ``v1``, the first version and the released script.

    Cost: DPO.
    References: arXiv 2603.00025.
    Differences from the paper:
        - The numbers of the second version were not seen; the defaults are those of a public script that computes it.
    Differences from the released code:
        - The released script is ``variant="v1"``. Weights of examples, which a second copy of it has, are left out.
    """
    term = barrier(barrier_weight, tau)
    if variant == "v2":
        return Preference(link=logistic(beta), pair_terms=(term,))
    weights = unit_mean((scored(given("field_weights")), differing()))
    return Preference((weights,), normalization="mean", link=logistic(beta), pair_terms=(term,))
