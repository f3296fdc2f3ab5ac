"""Direct Preference Optimization with critical tokens from contrastive estimation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokcredit import ops
from tokcredit.arguments import float_tensor
from tokcredit.blocks import log_probs, segment
from tokcredit.ops import LinkTerm
from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts
from tokcredit.settings import Range
from tokcredit.stages.base import input_name, number, whole_number
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.link import TermLink, logistic
from tokcredit.stages.pair import Pairs, PairTerm, counterparts, masked_product, weighing
from tokcredit.stages.token_weights import TokenWeight


@torch.no_grad()
def contrastive_log_probs(positive: Tensor, negative: Tensor, tokens: Tensor, strength: float = 1.0) -> Tensor:
    """Return the ``contrastive_log_probs`` of tokens: ``log_softmax((1 + strength) * positive - strength * negative)``.

    Args:
        positive: float ``(..., V)``, logits of the model that was trained on right solutions.
        negative: float ``(..., V)``, logits of the model that was trained on wrong ones.
        tokens: Integers ``(...)``; negative ones have a log-prob of 0.
        strength: Strength of the contrast, at least 0: the paper's beta. With 0 these are log-probs of the first model.

    Returns:
        ``(...)``, float32, or float64 for float64 logits.

    Raises:
        TypeError: The logits are not float tensors.
        ValueError: The shapes differ, the vocabularies among them, or the strength is out of range.
    """
    Range("number", at_least=0).checked("strength", strength)
    if float_tensor("positive", positive).shape != float_tensor("negative", negative).shape:
        raise ValueError(f"negative: expected {list(positive.shape)}, got {list(negative.shape)}")
    wide = torch.promote_types(torch.promote_types(positive.dtype, negative.dtype), torch.float32)
    return log_probs.from_logits((1 + strength) * positive.to(wide) - strength * negative.to(wide), tokens)


@dataclass(frozen=True)
class critical(TokenWeight):
    """``1 - s`` in rejected rows, where s is the probability of the token under a contrasted policy; 1 in chosen rows.

    Args:
        of: Input with ``log s``.
    """

    of: str = input_name("contrastive_log_probs")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The input with ``log s``."""
        return frozenset({self.of})

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        weights = -batch.input(self.of).expm1()
        return torch.where(per_token(advantages, batch.spans) < 0, weights, 1)


@dataclass(frozen=True)
class nothing(TermLink):
    """0: the loss of a pair is that of its terms alone."""

    @property
    def terms(self) -> tuple[LinkTerm, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class by_position(PairTerm):
    """The logistic loss of each chosen token against the rejected token at the same place, as the release has it.

    With ``x[t] = w[t] * (log p[t] - log p_ref[t])``, and 0 for a response that has no token at a place::

        term = mean over the places of a padded row of -log sigmoid(beta * (x[chosen, place] - x[rejected, place]))

    The places of the prompt and of padding count, with a loss of log 2.

    Args:
        padded_length: Number of places of a row, at least the tokens of the longest response.
        beta: Strength of the preference, above 0.
        coefficient: Factor of the term, at least 0.
    """

    padded_length: int = whole_number(at_least=1)
    beta: float = number(0.1, above=0)
    coefficient: float = number(1.0, at_least=0)
    metric: ClassVar[str] = "by_position_mean"
    reads = frozenset({"ref_log_probs"})

    def check(self, batch: Rollouts) -> None:
        """Check that no response is longer than a padded row.

        Args:
            batch: The rows.

        Raises:
            ValueError: One is.
        """
        if bool((batch.lengths > self.padded_length).any()):
            raise ValueError(
                f"padded_length: expected at least {int(batch.lengths.max())}, the tokens of the longest response, got "
                f"{self.padded_length}"
            )

    def __call__(self, pairs: Pairs) -> Tensor:
        batch, spans = pairs.batch, pairs.batch.spans
        weights = torch.ones_like(batch.rewards)[:, None] if pairs.weights is None else pairs.weights
        x = pairs.variables["log_probs"] - batch.input("ref_log_probs")
        x = masked_product(x, per_token(weights, spans), weighing(spans, weights))
        at = counterparts(batch)
        other = torch.where(at >= 0, x[at], 0)
        # Each place once: at the chosen token, or at a rejected token without a chosen one.
        signs = ops.spread(torch.ones_like(batch.rewards).index_fill_(0, pairs.rows[1], -1), spans)
        losses = -functional.logsigmoid(self.beta * signs * (x - other))
        rows = segment.sum(losses, spans.with_mask(batch.response_mask & ((signs > 0) | (at < 0))))
        chosen, rejected = (rows.index_select(0, own) for own in pairs.rows)
        longer = torch.maximum(*(batch.lengths.index_select(0, own) for own in pairs.rows))
        rest = (self.padded_length - longer).to(rows.dtype)
        return (chosen + rejected + math.log(2) * rest) / self.padded_length


def cdpo(
    beta: Annotated[float, Range("number", above=0)] = 1.0,
    variant: Literal["paper", "released_code"] = "paper",
    padded_length: Annotated[int | None, Range("whole number", at_least=1, optional=True)] = None,
) -> Preference:
    """cDPO: DPO that pushes down the critical tokens of a wrong solution and leaves the others.

    A token of the rejected response is critical where a model of right solutions finds it less probable than a model of
    wrong ones. With ``log s`` the ``contrastive_log_probs`` of a token under both::

        log s = log_softmax((1 + b) * z_positive - b * z_negative)[token]          with b = 1
        S = sum over the tokens of a response of w * (log p - log p_ref);  w = 1 - s if it is rejected, else 1
        loss = mean over pairs of -log sigmoid(beta * (S[chosen] - S[rejected]))

    Args:
        beta: Strength of the preference, above 0: the paper's gamma. The released code has 0.1.
        variant: ``paper``, or ``released_code`` for its loss of positions.
        padded_length: Places of a padded row with its prompt, for ``released_code``.

    Raises:
        ValueError: ``padded_length`` is missing, or not needed.

    Cost: DPO, and the log-probs of two more models on the rejected responses.
    References: arXiv 2411.19943.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - The release applies the loss to each position, the k-th chosen with the k-th rejected token, and averages over
          the padded length, prompt included. This is ``variant="released_code"``; the default is the paper's loss.
        - There the last token of a rejected response has weight 1. Here this is a ``contrastive_log_probs`` of -inf.
    """
    if (padded_length is None) != (variant == "paper"):
        expected = "None" if variant == "paper" else "a whole number"
        raise ValueError(f"cdpo: padded_length: expected {expected} because of {variant}, got {padded_length}")
    if padded_length is None:
        return Preference((critical(),), link=logistic(beta))
    return Preference((critical(),), link=nothing(), pair_terms=(by_position(padded_length, beta),))
