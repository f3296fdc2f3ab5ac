"""Log-probs and entropies of rollouts under a model, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokcredit import policy
from tokcredit.rollouts import Rollouts


def padded_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Prompts as int64 ``(R, P)``, -1 on the left of the shorter ones."""
    width = max(map(len, prompts))
    return torch.tensor([[-1] * (width - len(p)) + list(p) for p in prompts], device=device)


def score(model: Any, batch: Rollouts, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each token and entropy of the distribution before it, each ``[N]``.

    Args:
        model: a causal language model of transformers.
        batch: packed rollouts with ``extras["prompt_tokens"]`` as :func:`padded_prompts` makes them.
        temperature: logits are divided by it.
    """
    prompt = batch.extras["prompt_tokens"]
    prompt = prompt[:, prompt.shape[1] - int((prompt >= 0).sum(1).max()) :]
    tokens = batch.to_padded(batch.tokens).long()
    inside = torch.arange(tokens.shape[1], device=tokens.device) < (batch.end - batch.begin)[:, None]
    attention = torch.cat([prompt >= 0, inside], 1)
    logits = model(
        torch.cat([prompt.clamp(min=0), tokens], 1),
        attention_mask=attention.long(),
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=tokens.shape[1] + 1,
        use_cache=False,
    ).logits
    # The last logits predict beyond the row; a target of -1 leaves them out without copying the others.
    targets = torch.nn.functional.pad(tokens.masked_fill(~inside, -1), (0, 1), value=-1)
    log_probs, entropies = policy.log_probs_and_entropies(logits, targets, temperature)
    return log_probs[:, :-1][inside], entropies[:, :-1][inside]
