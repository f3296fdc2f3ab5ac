"""Scoring: next-token distributions, log-probs and entropies of rollouts under a model, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcredit.blocks import head, log_probs
from tokcredit.rollouts import Rollouts
from tokcredit.train.output_layer import OutputLayer, body, output_layer
from tokcredit.train.virtual_tokens import known


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompts as one tensor with padding on the left.

    Args:
        prompts: Token ids of each prompt; at least one prompt.
        pad: Token id of the padding.
        device: Device of the tensors.

    Returns:
        int64 ``(B, P)``, and bool ``(B, P)``, True where there is no padding.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
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


class Predicted(NamedTuple):
    """Predictions of a model for padded rows of length T.

    Attributes:
        logits: float ``(R, T, V)``, or None; position t has the logits that predict token t.
        hidden_states: float ``(R, T, d)``, final hidden states that the logits come from, or None.
        tokens: int64 ``(R, T)``, -1 at padding and where the policy did not choose the token.
        inside: bool ``(R, T)``, False at padding; indexing with it gives the packed order of the batch.
    """

    logits: Tensor | None
    hidden_states: Tensor | None
    tokens: Tensor
    inside: Tensor


def predict(model: Any, batch: Rollouts, hidden_states: bool = False, logits: bool = True) -> Predicted:
    """Return next-token predictions along the rows, with gradient.

    A prompt is computed once for all rows that continue it: they share its keys and values, and their gradients.

    Args:
        model: Causal language model of transformers, whose cache holds plain keys and values.
        batch: Packed rollouts with ``prompt_tokens``.
        hidden_states: Whether to return hidden states.
        logits: Whether to return logits; without them the output layer of the model is not computed.
    """
    prompts, of_row = known(model, batch.input("prompt_tokens")).unique(dim=0, return_inverse=True)
    prompts = prompts[:, prompts.shape[1] - int((prompts >= 0).sum(1).max()) :]
    real, prompts = prompts >= 0, prompts.clamp(min=0)
    shared = prefill(model, prompts, real)
    if shared is not None:
        shared.batch_select_indices(of_row)
    tokens = batch.to_padded(batch.tokens).long()
    inside = torch.arange(tokens.shape[1], device=tokens.device) < (batch.end - batch.begin)[:, None]
    everything = torch.cat([real[of_row], inside[:, :-1]], 1)
    out = (model if logits else body(model))(
        torch.cat([prompts[of_row, -1:], tokens[:, :-1]], 1),
        attention_mask=everything.long(),
        position_ids=_positions(everything)[:, -tokens.shape[1] :],
        past_key_values=shared,
        use_cache=shared is not None,
        output_hidden_states=hidden_states and logits,
    )
    hidden = None if not hidden_states else out.hidden_states[-1] if logits else out.last_hidden_state
    tokens = tokens.masked_fill(~batch.to_padded(batch.response_mask), -1)
    return Predicted(out.logits if logits else None, hidden, tokens, inside)


def score(model: Any, batch: Rollouts, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each token and the entropy of the distribution that predicts it, with gradient.

    Args:
        model: Causal language model of transformers.
        batch: Packed rollouts with ``prompt_tokens``.
        temperature: Logits are divided by it.

    Returns:
        Two float tensors ``[N]``, in nats; 0 where the policy did not choose the token.
    """
    layer = output_layer(model)
    predicted = predict(model, batch, hidden_states=layer is not None, logits=layer is None)
    return scores_of(predicted, layer, temperature, overwrite=True)


def scores_of(
    predicted: Predicted, layer: OutputLayer | None, temperature: float, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of predictions, with gradient.

    Args:
        predicted: From :func:`predict`.
        layer: Output layer of the model, which predictions without logits need.
        temperature: Logits are divided by it.
        overwrite: Whether the backward pass may write over the logits; only if nothing else reads them.

    Returns:
        Two float tensors ``[N]``, in nats.
    """
    if predicted.logits is None:
        assert layer is not None and predicted.hidden_states is not None
        both = head.log_probs_and_entropies(
            predicted.hidden_states,
            layer.weight,
            predicted.tokens,
            layer.bias,
            **{"temperature": temperature, **layer.settings},
        )
    else:
        both = log_probs.with_entropies(predicted.logits, predicted.tokens, temperature, overwrite)
    return both[0][predicted.inside], both[1][predicted.inside]
