"""Stages of preference objectives beside the link: the divergence in the score of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.spans import Spans
from tokcredit.stages.base import Stage, flag, number, parts
from tokcredit.stages.token_weights import TokenWeight


class Divergence(Stage):
    """Base of divergences from the reference policy in the score of a row.

    Attributes:
        kind: ``"divergence"``.
        variable: Per-token variable that ``loss`` is given by name, with gradient.
        token_weights: Factors of the tokens.
    """

    kind: ClassVar[str] = "divergence"
    variable: ClassVar[str]
    token_weights: tuple[TokenWeight, ...]

    def __call__(self, divergences: Tensor, spans: Spans, weights: Tensor | None, chosen: Tensor) -> Tensor:
        """Return what is added to the score of each row, float ``[R]``, with gradient.

        Args:
            divergences: float ``[N]``, the variable.
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

    References:
        arXiv 2404.11999.
    """

    variable: ClassVar[str] = "ref_forward_kl"
    strength: float = number(1.0, at_least=0)
    token_weights: tuple[TokenWeight, ...] = parts(TokenWeight)
    chosen_gradient: bool = flag(True)

    def __call__(self, divergences: Tensor, spans: Spans, weights: Tensor | None, chosen: Tensor) -> Tensor:
        total = segment.weighted_sum(divergences, spans, weights)
        if not self.chosen_gradient:
            total = total.index_copy(0, chosen, total.detach().index_select(0, chosen))
        return self.strength * total


__all__ = ["Divergence", "sequential_kl"]
