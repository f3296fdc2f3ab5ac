"""What a model says about rollouts: next-token distributions, log-probs and entropies, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcredit.blocks import log_probs
from tokcredit.rollouts import Rollouts


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as int64 ``(B, P)``, and where they are real, bool ``(B, P)``."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def _positions(real: Tensor) -> Tensor:
    return (real.cumsum(1) - 1).clamp(min=0)


def prefill(model: Any, prompts: Tensor, real: Tensor) -> Any:
    """Keys and values of all but the last token of left-padded prompts; None where there is but one."""
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
        logits: ``(R, T, V)``, for the token that stands at each position.
        hidden_states: ``(R, T, d)``, final ones they come from, or None.
        tokens: int64 ``(R, T)``, -1 where the policy chose none: behind the end of a row, and under the mask.
        inside: bool ``(R, T)``; indexing with it gives the packed order of the batch.
    """

    logits: Tensor
    hidden_states: Tensor | None
    tokens: Tensor
    inside: Tensor


def predict(model: Any, batch: Rollouts, hidden_states: bool = False) -> Predicted:
    """Next-token predictions along the rows, with gradient.

    A prompt is computed once, however many of the rows continue it: its keys and values are shared, and so are their
    gradients.

    Args:
        model: a causal language model of transformers, whose cache is plain keys and values.
        batch: packed rollouts; ``extras["prompt_tokens"]`` is int64 ``(R, P)``, -1 on the left of shorter prompts.
        hidden_states: whether to return them.
    """
    prompts, of_row = batch.extras["prompt_tokens"].unique(dim=0, return_inverse=True)
    prompts = prompts[:, prompts.shape[1] - int((prompts >= 0).sum(1).max()) :]
    real, prompts = prompts >= 0, prompts.clamp(min=0)
    shared = prefill(model, prompts, real)
    if shared is not None:
        shared.batch_select_indices(of_row)
    tokens = batch.to_padded(batch.tokens).long()
    inside = torch.arange(tokens.shape[1], device=tokens.device) < (batch.end - batch.begin)[:, None]
    everything = torch.cat([real[of_row], inside[:, :-1]], 1)
    out = model(
        torch.cat([prompts[of_row, -1:], tokens[:, :-1]], 1),
        attention_mask=everything.long(),
        position_ids=_positions(everything)[:, -tokens.shape[1] :],
        past_key_values=shared,
        use_cache=shared is not None,
        output_hidden_states=hidden_states,
    )
    hidden = out.hidden_states[-1] if hidden_states else None
    return Predicted(out.logits, hidden, tokens.masked_fill(~batch.to_padded(batch.response_mask), -1), inside)


def score(model: Any, batch: Rollouts, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each token and entropy of the distribution before it, each ``[N]``, with gradient.

    Both are 0 where the policy did not choose the token.
    """
    return scores_of(predict(model, batch), temperature, overwrite=True)


def scores_of(predicted: Predicted, temperature: float, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, each ``[N]``, of logits divided by the temperature.

    The backward pass may ``overwrite`` logits that nothing else reads.
    """
    both = log_probs.with_entropies(predicted.logits, predicted.tokens, temperature, overwrite)
    return both[0][predicted.inside], both[1][predicted.inside]
