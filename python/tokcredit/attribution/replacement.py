"""Samplers of tokens that stand in place of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokcredit.arguments import whole_number
from tokcredit.attribution.model import evaluated

Sampler = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]
"""From ids ``[B, n]``, which of them to replace, bool ``[B, n]``, and a generator: ids in which those are replaced."""


def uniform(tokens: int | Sequence[int] | Tensor) -> Sampler:
    """Return a sampler that draws each replacement uniformly.

    Args:
        tokens: Size of the vocabulary, or the token ids that may be drawn.

    Raises:
        ValueError: There is no token.
    """
    if isinstance(tokens, int):
        tokens = range(whole_number("tokens", tokens, 1))
    allowed = torch.as_tensor(tokens, dtype=torch.int64)
    if allowed.dim() != 1 or allowed.numel() == 0:
        raise ValueError(f"tokens: expected at least one token, got {list(allowed.shape)}")

    def sample(ids: Tensor, replaced: Tensor, generator: torch.Generator | None) -> Tensor:
        place = torch.randint(allowed.numel(), ids.shape, generator=generator, device=ids.device)
        return torch.where(replaced, allowed.to(ids.device)[place], ids)

    return sample


def from_masked_model(model: Any, mask: int) -> Sampler:
    """Return a sampler that draws each replacement from a masked language model, all of a row at once.

    The model must have the vocabulary of the model that is explained.

    Args:
        model: Masked language model of transformers.
        mask: Its mask token.
    """

    def sample(ids: Tensor, replaced: Tensor, generator: torch.Generator | None) -> Tensor:
        with evaluated(model), torch.no_grad():
            logits = model(input_ids=ids.masked_fill(replaced, mask)).logits.float()
        logits[..., mask] = -torch.inf
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
        return torch.where(replaced, drawn.view(ids.shape), ids)

    return sample
