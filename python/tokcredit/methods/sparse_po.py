"""Preference optimization with sparse masks of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import float_tensor
from tokcredit.blocks import segment
from tokcredit.preference import Preference
from tokcredit.settings import Range
from tokcredit.spans import Spans
from tokcredit.stages.base import input_name, number
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import Pairs, PairTerm, sequential_kl
from tokcredit.stages.token_score import given
from tokcredit.stages.token_weights import scored


@torch.no_grad()
def activation_masks(activations: Mapping[str, Sequence[Tensor]], spans: Spans) -> Tensor:
    """Return MaPO's masks from activations of the reference policy, 0 outside of responses.

    The mean of an activation over its features is min-max scaled to ``[0, 1]`` in each response, 1 where all are equal.
    A NaN or infinite one gives NaN. A mask is the mean over the kinds of the mean over the activations of a kind.

    Args:
        activations: float ``[N, features]`` by kind, for example ``mlp``, ``attention``, ``residual`` and ``logits``,
            at the position that predicts the token.
        spans: The rows, with the mask of the responses.

    Returns:
        float32 ``[N]``.

    Raises:
        TypeError: An activation is not a float tensor.
        ValueError: There is no activation, or its shape is wrong.
    """
    if not activations or not all(len(x) for x in activations.values()):
        raise ValueError(f"activations: expected at least one of each kind, got {list(activations)}")
    for kind, of_kind in activations.items():
        for x in of_kind:
            if float_tensor(kind, x).dim() != 2 or x.shape[0] != spans.size or not x.shape[1]:
                raise ValueError(f"{kind}: expected float [{spans.size}, features], got {list(x.shape)}")

    def scaled(activation: Tensor) -> Tensor:
        x = activation.float().mean(-1)
        low = segment.minimum(x, spans)
        width = ops.spread(segment.maximum(x, spans) - low, spans)
        return torch.where(width == 0, 1, (x - ops.spread(low, spans)) / width)

    kinds = [torch.stack([scaled(x) for x in of_kind]).mean(0) for of_kind in activations.values()]
    inside = ops.spread(torch.ones(spans.num_rows, dtype=torch.bool, device=spans.device), spans)
    return torch.where(inside, torch.stack(kinds).mean(0), 0)


class MaskNetwork(torch.nn.Module):
    """SparsePO's masks of tokens from the hidden states of the reference policy, learned together with the policy.

    ``mask = relu(sum over layers of mix[l] * relu(w[l] . layer_norm(state[l]) + b[l]))``, with dropout after both.

    Args:
        layers: Number of layers, at least 1.
        width: Size of a hidden state, at least 1.
        dropout: Probability with which numbers are dropped in training, at least 0 and below 1.

    Raises:
        TypeError: A number has the wrong type.
        ValueError: It is out of range.
    """

    def __init__(self, layers: int, width: int, dropout: float = 0.01) -> None:
        super().__init__()
        for name, number_of in (("layers", layers), ("width", width)):
            Range("whole number", at_least=1).checked(name, number_of)
        Range("number", at_least=0, below=1).checked("dropout", dropout)
        self.norm = torch.nn.LayerNorm(width)
        self.of_layer = torch.nn.ModuleList(torch.nn.Linear(width, 1) for _ in range(layers))
        self.mix = torch.nn.Linear(layers, 1, bias=False)
        self.dropout = torch.nn.Dropout(dropout)
        # A mixer below 0 would give masks of 0, which have no gradient.
        torch.nn.init.constant_(self.mix.weight, 1 / layers)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Return the masks, float ``(...)``, at least 0, with gradient to the network.

        Args:
            states: float ``(..., width)`` of each layer, without that of the embeddings, at the position that predicts
                the token.

        Raises:
            ValueError: There are fewer or more states than layers.
        """
        if len(states) != len(self.of_layer):
            raise ValueError(f"states: expected {len(self.of_layer)}, one of each layer, got {len(states)}")
        each = [layer(self.norm(x.detach())) for layer, x in zip(self.of_layer, states, strict=True)]
        mixed: Tensor = self.mix(self.dropout(torch.cat(each, -1).relu()))
        masks: Tensor = self.dropout(mixed.relu())
        return masks.squeeze(-1)


@dataclass(frozen=True)
class sparsity(PairTerm):
    """The L1 norm of a variable over the tokens of both responses.

    Args:
        of: The variable, which ``loss`` takes by name, with gradient.
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
    """

    of: str = input_name("reward_masks")
    coefficient: float = number(0.001, at_least=0, scheduled=True)

    @property
    def metric(self) -> str:  # type: ignore[override] # a class variable in the base
        """Name of the variable with ``_l1_mean``."""
        return f"{self.of}_l1_mean"

    @property
    def variables(self) -> tuple[str, ...]:  # type: ignore[override] # a class variable in the base
        """The variable."""
        return (self.of,)

    def __call__(self, pairs: Pairs) -> Tensor:
        rows = segment.weighted_sum(pairs.variables[self.of].abs(), pairs.batch.spans)
        return rows.index_select(0, pairs.rows[0]) + rows.index_select(0, pairs.rows[1])


_Penalty = Annotated[float, Range("number", at_least=0)]


def sparse_po(
    beta: float = 0.1,
    learned: bool = False,
    independent: bool = False,
    l1_reward: _Penalty = 0.0,
    l1_divergence: _Penalty = 0.0,
) -> Preference:
    """SparsePO: TDPO whose log-ratios and divergences have a mask, a factor of each token.

    With the masks ``m`` of log-ratios and ``d`` of divergences, which are the same unless ``independent``::

        S = sum over the tokens of a response of m * (log p - log p_ref)
        K = sum over the tokens of a response of d * KL(reference || policy)
        loss = mean over pairs of -log sigmoid(beta * (S[chosen] - S[rejected] - (K[rejected] - K[chosen])))

    Masks are the inputs ``reward_masks`` and ``divergence_masks``: with those of ``activation_masks`` this is MaPO.
    Learned masks are variables instead, from a ``MaskNetwork``; ``loss`` takes them by name, with gradient, and adds
    their L1 norm. For both, ``from tokcredit.methods.sparse_po import MaskNetwork, activation_masks``::

        loss += mean over pairs of l1_reward * (|m[chosen]| + |m[rejected]|) + l1_divergence * (|d[chosen]| + ...)

    Args:
        beta: Strength of the preference, above 0.
        learned: Whether masks are variables of ``loss`` with gradient.
        independent: Whether divergences have masks of their own.
        l1_reward: Factor of the L1 norm of learned masks of log-ratios, at least 0; 0 if masks are not learned.
        l1_divergence: Factor of the L1 norm of learned masks of divergences, likewise.

    Cost: TDPO1, and activations or hidden states of the reference policy.
    References: arXiv 2410.05102.
    Differences from the paper:
        - A response of equal activations has masks of 1.
        - A common mask has the factor ``(l1_reward + l1_divergence) / 2``, as in the released code.
    Differences from the released code:
        - The release keeps minima and maxima of activations in float16. Its other networks of masks are left out.
        - The trainer's networks have no dropout, and it reads the residual stream after the embeddings, between layers,
          and after the final norm.
    """
    link, of_divergence = logistic(beta), "divergence_masks" if independent else "reward_masks"
    for name, coefficient in (("l1_reward", l1_reward), ("l1_divergence", l1_divergence)):
        if coefficient and not learned:
            raise ValueError(f"sparse_po: {name}: expected 0 because masks are not learned, got {coefficient}")
    if not learned:
        masks = [(scored(given(name)),) for name in ("reward_masks", of_divergence)]
        return Preference(masks[0], link=link, divergence=sequential_kl(token_weights=masks[1]))
    if independent:
        norms = [sparsity("reward_masks", l1_reward), sparsity("divergence_masks", l1_divergence)]
    else:
        norms = [sparsity("reward_masks", (l1_reward + l1_divergence) / 2)]
    return Preference(
        link=link,
        divergence=sequential_kl(learned_weights=of_divergence),
        pair_terms=tuple(x for x in norms if x.coefficient),
        learned_weights="reward_masks",
    )
