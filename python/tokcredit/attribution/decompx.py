"""DecompX: every state as a sum of one vector per token, through all parts of an encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcredit.attribution import encoder

_TINY = 1e-12


def decompx(model: Any, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return what each token contributes to each logit of a classifier. The contributions add up to the logits.

    ``E[i, j]`` is the part of state i that comes from token j; at the input ``E[i, j] = x[i]`` if ``i == j``, else 0. A
    bias b is split by ``w[j] = |E[i, j] . b| / sum over k of |E[i, k] . b|``, so ``E[i, j] += w[j] * b``::

        attention, first layer   E[i, j] += sum over h of A[h, i, j] * (x[j] @ W_V[h] + b_V[h]) @ W_O[h];  split b_O
        attention, later layers  E[i, j] += sum over k, h of A[h, i, k] * E[k, j] @ W_V[h] @ W_O[h]
                                 split b_V @ W_O + b_O
        LayerNorm                E[i, j] = (E[i, j] - mean(E[i, j])) / std[i] * gamma;  split beta
        feed-forward             F = E @ W_1;  split b_1;  F = F * act(z) / z;  F = F @ W_2;  split b_2;  E = E + F
        head                     C = E[0] @ W_p;  split b_p;  C = C * tanh(z) / z;  C = C @ W_c;  split b_c

    Memory is O(n * n * d) per row, and rows are computed one after another.

    Args:
        model: Sequence classifier of the BERT or RoBERTa family of transformers.
        ids: Integers ``[B, T]``.
        attention_mask: ``[B, T]``, 0 or False at padding, or None.

    Returns:
        float ``[B, T, classes]``; 0 at padding. Special tokens have their contributions like the others.

    Raises:
        TypeError: The model is of another family or no sequence classifier, or a dtype is wrong.
        ValueError: A shape is wrong, or the first token of a row is masked.

    References:
        arXiv 2306.02873; in prompts: FrugalPrompt, arXiv 2510.16439.
    """
    layers, (dense, classes) = encoder.layers(model), encoder.head(model)
    out = classes.bias.new_zeros((*ids.shape, len(classes.bias)))
    for row, (at, x) in enumerate(encoder.embedded(model, ids, attention_mask)):
        parts = torch.diag_embed(x.T).permute(1, 2, 0)  # [n, n, d]
        for number, layer in enumerate(layers):
            parts = _layer(layer, parts, first=number == 0)
        contributions = _split(parts[:1] @ dense.weight, dense.bias)
        z = contributions.sum(1, keepdim=True)
        contributions = contributions * (z.tanh() / (z + _TINY))
        out[row, at] = _split(contributions @ classes.weight, classes.bias)[0]
    return out


def _split(parts: Tensor, bias: Tensor) -> Tensor:
    """Return parts ``[n, m, d]`` with the bias added, shared by the size of the inner products with it."""
    share = (parts @ bias).abs()
    return parts + (share / (share.sum(1, keepdim=True) + _TINY))[..., None] * bias


def _normalized(norm: encoder.Norm, parts: Tensor) -> Tensor:
    return _split(norm.linear(parts, parts.sum(1)), norm.beta)


def _layer(layer: encoder.Layer, parts: Tensor, first: bool) -> Tensor:
    x = parts.sum(1)
    attention = layer.attention(x)
    output = layer.output.weight.unflatten(0, (layer.heads, -1))
    if first:  # every token has its own value, bias included
        value = layer.value(x).unflatten(-1, (layer.heads, -1))
        parts = parts + torch.einsum("hij,jhk,hkd->ijd", attention, value, output)
        parts = _split(parts, layer.output.bias)
    else:
        mixed = parts
        for weights, own, to in zip(
            attention, layer.value.weight.unflatten(1, (layer.heads, -1)).unbind(1), output, strict=True
        ):
            mixed = mixed + torch.einsum("ik,kjd->ijd", weights, parts @ own) @ to
        parts = _split(mixed, layer.value.bias @ layer.output.weight + layer.output.bias)
    parts = _normalized(layer.first_norm, parts)
    # The feed-forward network is wide: some rows at a time.
    return torch.cat([_normalized(layer.last_norm, some + _forward(layer, some)) for some in parts.split(encoder.ROWS)])


def _forward(layer: encoder.Layer, parts: Tensor) -> Tensor:
    inner = _split(parts @ layer.up.weight, layer.up.bias)
    z = inner.sum(1, keepdim=True)
    return _split((inner * (layer.activation(z) / (z + _TINY))) @ layer.down.weight, layer.down.bias)
