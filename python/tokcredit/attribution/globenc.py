"""GlobEnc: the norms of what tokens give to each other in every layer, multiplied along the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcredit.attribution import encoder


def globenc(model: Any, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return how much each token gave to the last state of the first token, scaled from 0 to 1 in each row.

    In each layer, with input x, attention A, heads h, and both norms as linear maps at the states of the layer::

        e[i, j] = sum over h of A[h, i, j] * (x[j] @ W_V[h] + b_V[h]) @ W_O[h] + (x[j] if i == j else 0)
        e = LN2(LN1(e)),  LN(e[i, j]) = (e[i, j] - mean(e[i, j])) / std[i] * gamma
        N[i, j] = |e[i, j]|

    The score is ``(N[L] @ ... @ N[1])[0, j]``, divided by its maximum and scaled by minimum and maximum. The
    feed-forward network is left out of ``e``, as in the paper. Special tokens are scored like the others; padding
    has 0.

    Args:
        model: Encoder of the BERT or RoBERTa family of transformers, with or without a head.
        ids: Integers ``[B, T]``.
        attention_mask: ``[B, T]``, 0 or False at padding, or None.

    Returns:
        float ``[B, T]``.

    Raises:
        TypeError: The model is of another family, or a dtype is wrong.
        ValueError: A shape is wrong, or the first token of a row is masked.

    References:
        arXiv 2205.03286; in prompts: FrugalPrompt, arXiv 2510.16439.
    """
    layers = encoder.layers(model)
    score: Tensor | None = None
    for row, (at, x) in enumerate(encoder.embedded(model, ids, attention_mask)):
        if score is None:
            score = x.new_zeros(ids.shape)
        own = rollout(layers, x)[0]
        own = own / own.max()
        width = own.max() - own.min()
        score[row, at] = (own - own.min()) / width if width > 0 else torch.zeros_like(own)
    return torch.zeros(ids.shape) if score is None else score


def rollout(layers: list[encoder.Layer], x: Tensor) -> Tensor:
    """Return the product of the norms of all layers, ``[n, n]``, scaled by a positive number.

    Args:
        layers: Layers of the encoder.
        x: float ``[n, d]``, input of the first layer.
    """
    out = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for layer in layers:
        norms, x = _norms(layer, x)
        out = norms @ out
        out = out / out.max()  # entries grow with depth
    return out


def _norms(layer: encoder.Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``N`` of a layer, and its output."""
    attention = layer.attention(x)
    first = layer.mixed(attention, x) + x
    middle = layer.first_norm(first)
    last = layer.down(layer.activation(layer.up(middle))) + middle
    value = layer.value(x).unflatten(-1, (layer.heads, -1))
    given = torch.einsum("jhk,hkd->hjd", value, layer.output.weight.unflatten(0, (layer.heads, -1)))
    norms = []
    for some in torch.arange(len(x), device=x.device).split(encoder.ROWS):
        e = torch.einsum("hij,hjd->ijd", attention[:, some], given)
        e[torch.arange(len(some), device=x.device), some] += x[some]
        e = layer.last_norm.linear(layer.first_norm.linear(e, first[some]), last[some])
        norms.append(e.norm(dim=-1))
    return torch.cat(norms), layer.last_norm(last)
