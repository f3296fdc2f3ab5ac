"""Scoring: next-token distributions, log-probs and entropies of rollouts under a model, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokcredit.packing import TreePack, pack
from tokcredit.packing import predictions as packing
from tokcredit.packing.output_layer import output_layer
from tokcredit.packing.predictions import Predicted, scores
from tokcredit.rollouts import Rollouts
from tokcredit.train import virtual_tokens

_DENSE_PLACES = 1024
"""Places of a bin on the CPU, where the work of attention grows with their square."""


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompts as one tensor with padding on the left.

    Args:
        prompts: Token ids of each prompt; there may be no prompt.
        pad: Token id of the padding.
        device: Device of the tensors.

    Returns:
        int64 ``(B, P)``, and bool ``(B, P)``, True where there is no padding.
    """
    width = max(map(len, prompts), default=0)
    rows = [[pad] * (width - len(p)) + list(p) for p in prompts]
    ids = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width)
    lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64, device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def _positions(real: Tensor) -> Tensor:
    return (real.cumsum(1) - 1).clamp(min=0)


def prefill(model: Any, prompts: Tensor, real: Tensor) -> Any:
    """Return keys and values of all but the last token of left-padded prompts, or None if there is only one token.

    Args:
        model: Causal language model.
        prompts: int64 ``(B, P)``.
        real: bool ``(B, P)``, False at padding.
    """
    if prompts.shape[1] == 1:
        return None
    return model(
        prompts[:, :-1],
        attention_mask=real[:, :-1].long(),
        position_ids=_positions(real[:, :-1]),
        logits_to_keep=1,
        use_cache=True,
    ).past_key_values


def plan(batch: Rollouts, wanted: Tensor | None = None) -> TreePack:
    """Return how the rows are forwarded: each distinct token once, in bins that suit the device.

    Args:
        batch: Packed rollouts with ``prompt_tokens``.
        wanted: bool ``[N]``, tokens to predict, or None for those that the policy chose.
    """
    if batch.device.type != "cpu":
        return pack(batch, wanted=wanted)
    longest = batch.input("prompt_tokens").shape[1] + batch.width
    return pack(batch, max(longest, _DENSE_PLACES), wanted=wanted)


def predict(model: Any, packed: TreePack, *, hidden_states: bool = True, logits: bool = False) -> Predicted:
    """Return hidden states and logits of the predictions of a plan, ``[Q, ...]`` each, with gradient.

    Args:
        model: Causal language model of transformers.
        packed: The plan.
        hidden_states: Whether to return hidden states.
        logits: Whether to return logits; without them the output layer of the model is not computed.
    """
    parts = list(packed) or [packed.empty_part]
    found = [packing.predict(model, part, hidden_states=hidden_states, logits=logits) for part in parts]
    return Predicted(*(None if x[0] is None else torch.cat(x) for x in zip(*found, strict=True)))


def score(model: Any, batch: Rollouts, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each token and the entropy of the distribution that predicts it, with gradient.

    Args:
        model: Causal language model of transformers.
        batch: Packed rollouts with ``prompt_tokens``.
        temperature: Logits are divided by it.

    Returns:
        Two float tensors ``[N]``, in nats; 0 where the policy did not choose the token.
    """
    prompts = virtual_tokens.known(model, batch.input("prompt_tokens"))
    layer, packed = output_layer(model), plan(batch.with_inputs(prompt_tokens=prompts))
    predicted = predict(model, packed, hidden_states=layer is not None, logits=layer is None)
    found = scores(predicted, packed.target, layer, temperature, overwrite=True)
    return packed.to_rows(found[0]), packed.to_rows(found[1])
