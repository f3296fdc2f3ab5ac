"""The layers of encoders of the BERT and RoBERTa families of transformers, as the formulas read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcredit.arguments import INTEGERS, describe, tensor
from tokcredit.attribution.model import check_tokens, evaluated

_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")

ROWS = 64
"""Rows of a decomposition that are computed at once."""


class Linear(NamedTuple):
    """``x @ weight + bias``.

    Attributes:
        weight: ``[inputs, outputs]``.
        bias: ``[outputs]``.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs.

        Args:
            x: float ``[..., inputs]``.
        """
        return x @ self.weight + self.bias


class Norm(NamedTuple):
    """LayerNorm: ``(x - mean) / sqrt(var + epsilon) * gamma + beta``.

    Attributes:
        gamma: ``[d]``.
        beta: ``[d]``.
        epsilon: Added to the variance.
    """

    gamma: Tensor
    beta: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalized states.

        Args:
            x: float ``[n, d]``.
        """
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.gamma, self.beta, self.epsilon)

    def linear(self, parts: Tensor, x: Tensor) -> Tensor:
        """Return parts of states after the norm as a linear map at ``x``: with the deviation of ``x``, without beta.

        Args:
            parts: float ``[n, m, d]``.
            x: float ``[n, d]``.
        """
        deviation = (x.var(-1, correction=0) + self.epsilon).sqrt()
        return (parts - parts.mean(-1, keepdim=True)) / deviation[:, None, None] * self.gamma


class Layer(NamedTuple):
    """Weights of one layer.

    Attributes:
        query: ``[d, d]``.
        key: ``[d, d]``.
        value: ``[d, d]``.
        output: ``[d, d]``, of the attention.
        first_norm: After the attention.
        up: ``[d, w]``.
        down: ``[w, d]``.
        last_norm: After the feed-forward network.
        activation: Elementwise function between ``up`` and ``down``.
        heads: Number of heads.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    first_norm: Norm
    up: Linear
    down: Linear
    last_norm: Norm
    activation: Callable[[Tensor], Tensor]
    heads: int

    def attention(self, x: Tensor) -> Tensor:
        """Return the attention probabilities, ``[heads, n, n]``.

        Args:
            x: float ``[n, d]``, input of the layer.
        """
        q, k = (linear(x).unflatten(-1, (self.heads, -1)).transpose(0, 1) for linear in (self.query, self.key))
        return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)

    def head_values(self) -> Tensor:
        """Return ``W_V[h] @ W_O[h]`` of each head, ``[heads, d, d]``."""
        value = self.value.weight.unflatten(1, (self.heads, -1))
        output = self.output.weight.unflatten(0, (self.heads, -1))
        return torch.einsum("ahk,hkb->hab", value, output)

    def mixed(self, attention: Tensor, x: Tensor) -> Tensor:
        """Return the output of the attention before the residual connection, ``[n, d]``.

        Args:
            attention: ``[heads, n, n]``.
            x: float ``[n, d]``, input of the layer.
        """
        value = self.value(x).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        return self.output((attention @ value).transpose(0, 1).flatten(1))


def layers(model: Any) -> list[Layer]:
    """Return the layers of an encoder, in float32 at least.

    Args:
        model: Model of transformers.

    Raises:
        TypeError: It is of another family, or a decoder.
    """
    base = _base(model)
    dtype = torch.promote_types(base.dtype, torch.float32)

    def linear(x: Any) -> Linear:
        return Linear(x.weight.detach().to(dtype).T, x.bias.detach().to(dtype))

    def norm(x: Any) -> Norm:
        return Norm(x.weight.detach().to(dtype), x.bias.detach().to(dtype), x.eps)

    return [
        Layer(
            linear(own.attention.self.query),
            linear(own.attention.self.key),
            linear(own.attention.self.value),
            linear(own.attention.output.dense),
            norm(own.attention.output.LayerNorm),
            linear(own.intermediate.dense),
            linear(own.output.dense),
            norm(own.output.LayerNorm),
            own.intermediate.intermediate_act_fn,
            own.attention.self.num_attention_heads,
        )
        for own in base.encoder.layer
    ]


def head(model: Any) -> tuple[Linear, Linear]:
    """Return the dense layer before tanh and the one that gives the logits of a sequence classifier.

    Args:
        model: Sequence classifier of transformers.

    Raises:
        TypeError: It is none.
    """
    base = _base(model)
    classifier: Any = getattr(model, "classifier", None)
    if isinstance(classifier, torch.nn.Linear) and getattr(base, "pooler", None) is not None:
        pair = base.pooler.dense, classifier
    elif hasattr(classifier, "dense") and hasattr(classifier, "out_proj"):
        pair = classifier.dense, classifier.out_proj
    else:
        raise TypeError(f"model: expected a sequence classifier, got {type(model).__name__}")
    dtype = torch.promote_types(base.dtype, torch.float32)
    first, last = (Linear(x.weight.detach().to(dtype).T, x.bias.detach().to(dtype)) for x in pair)
    return first, last


def embedded(model: Any, ids: Tensor, attention_mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each row, the positions of its tokens and the input of the first layer at them, ``[n, d]``.

    What is masked has no part in any formula, so it is left out here.

    Args:
        model: Model of transformers.
        ids: Integers ``[B, T]``.
        attention_mask: ``[B, T]``, 0 or False at padding, or None.

    Raises:
        TypeError: A dtype is wrong, or the model is of another family.
        ValueError: A shape is wrong, or the first token of a row is masked.
    """
    base = _base(model)
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        raise TypeError(f"ids: expected integers [B, T], got {describe(ids)}")
    if ids.dim() != 2:
        raise ValueError(f"ids: expected [B, T], got {list(ids.shape)}")
    mask = torch.ones_like(ids, dtype=torch.bool)
    if attention_mask is not None:
        mask = tensor("attention_mask", attention_mask, (torch.bool, *INTEGERS), tuple(ids.shape), ids.device) != 0
    if not bool(mask[:, :1].any(1).all()):
        raise ValueError("attention_mask: expected padding on the right, got a row whose first token is masked")
    check_tokens(base, ids)
    # RoBERTa's positions begin behind the number of the padding token.
    most = base.config.max_position_embeddings - (
        0 if base.config.model_type == "bert" else base.config.pad_token_id + 1
    )
    if ids.shape[1] > most:
        raise ValueError(f"ids: expected at most {most} tokens in a row, got {ids.shape[1]}")
    with evaluated(base), torch.no_grad():
        x = base.embeddings(input_ids=ids)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for row, real in zip(x, mask, strict=True):
        yield real.nonzero()[:, 0], row[real]


def _base(model: Any) -> Any:
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _FAMILIES or getattr(config, "is_decoder", False):
        name = getattr(config, "model_type", type(model).__name__)
        raise TypeError(f"model: expected an encoder of the family {', '.join(_FAMILIES)}, got {name}")
    return getattr(model, model.base_model_prefix, model)
