"""Log-probabilities and entropies of tokens from the logits of a language model, with gradients; squared probabilities.

No float32 copy of ``(N, V)`` is made: with bf16 logits, the one that ``log_softmax`` in float32 makes and
keeps for the gradient is twice the size of the logits. Here two numbers per row are kept beside the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.rollouts import Rollouts


def _check(logits: Tensor, tokens: Tensor, temperature: float) -> None:
    if logits.dim() == 0 or logits.shape[:-1] != tokens.shape:
        expected = "at least one dimension" if logits.dim() == 0 else f"{list(logits.shape[:-1])}"
        raise ValueError(f"tokens: expected the shape of logits without V, {expected}, got {list(tokens.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a float dtype, got {logits.dtype}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


def log_probs_and_entropies(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and entropy in nats of the distribution it was drawn from.

    With ``p = softmax(logits[i] / temperature)``::

        log_probs[i] = log(p[tokens[i]])
        entropies[i] = -sum(p[j] * log(p[j]) for j in range(V))

    A token of -1 marks a position that takes no part: both results and the gradient are 0 there and its
    logits are not read. So the shift by one that next-token prediction needs is best done on the tokens (drop
    the first and append -1) and not on the logits: ``logits[:, :-1]`` is another layout and has to be copied
    first. Positions whose incoming gradient is 0 get a gradient of 0, whatever their logits hold.

    Args:
        logits: float ``(..., V)``; bf16 and fp16 are computed in float32. A logit of -inf has probability 0.
        tokens: int64 or int32 ``(...)``, -1 or an id below V.
        temperature: positive; what the logits were divided by when the tokens were drawn.
        overwrite: whether the backward pass may put the gradient where the logits are, which saves a second
            ``(N, V)``. For logits that nothing else reads, and one backward pass; torch raises an error at a second.

    Returns:
        Two tensors ``(...)``, float32, or float64 for float64 logits. Both have a gradient in the logits.

    Raises:
        ValueError: if shapes disagree, a token is out of range, or the temperature is not positive.
    """
    _check(logits, tokens, temperature)
    rows = logits.reshape(tokens.numel(), logits.shape[-1])
    log_probs, entropies = ops.logits(rows, tokens.reshape(-1), float(temperature), overwrite)
    return log_probs.view(tokens.shape), entropies.view(tokens.shape)


def log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token, ``log softmax(logits / temperature)[token]``; ``(...)``.

    Arguments, ignored positions and errors are those of :func:`log_probs_and_entropies`.
    """
    return log_probs_and_entropies(logits, tokens, temperature)[0]


@torch.no_grad()
def squared_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over the vocabulary of squared probabilities, ``sum(p[j] ** 2)``, without gradient; ``(...)``.

    At half the temperature the probabilities are squared and normalised anew, so for any token y this is
    ``exp(2 log p[y] - log p_half[y])``; for the most probable y nothing large cancels.

    Args:
        logits: as :func:`log_probs_and_entropies` takes them.
        tokens: int64 or int32 ``(...)``, -1 where a position takes no part, and its result is 0; else any id, it does
            not matter which.
        temperature: positive; what the logits were divided by when the tokens were drawn.

    Raises:
        ValueError: if shapes disagree, or the temperature is not positive.
    """
    _check(logits, tokens, temperature)
    likely = torch.where(tokens < 0, -1, logits.argmax(-1))
    double = 2 * log_probs(logits, likely, temperature)
    return torch.where(tokens < 0, 0, double.sub_(log_probs(logits, likely, temperature / 2)).exp_())


def normalisers(logits: Tensor, batch: Rollouts) -> Tensor:
    """``log sum_v exp(logits)`` where the policy chose the token, 0 elsewhere; logits ``[N, V]``, result ``[N]``."""
    chosen = torch.where(batch.response_mask, batch.tokens.long(), -1)
    own = logits.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
    return torch.where(batch.response_mask, own - log_probs(logits, chosen), 0)


def group_vocabulary(batch: Rollouts) -> tuple[Tensor, Tensor]:
    """The distinct tokens that the rows of each group chose, and which of them each token is.

    Takes five bytes of memory for each group and each id up to the largest.

    Returns:
        int64 ``[groups, K]``, rising token ids of each group and -1 after the last; int64 ``[N]``, the column of each
        token, -1 where the policy did not choose it.
    """
    chosen = batch.tokens.masked_fill(~batch.response_mask, 0)
    base = int(chosen.max()) + 1 if batch.num_tokens else 1
    # A cell for each group and id, after one for what the policy did not choose.
    cell = ops.spread(batch.group_index * base + 1, batch.rows, batch.tokens).add_(chosen)
    taken = torch.zeros(batch.num_groups * base + 1, dtype=torch.bool, device=cell.device).index_fill_(0, cell, True)
    names = taken[1:].nonzero()[:, 0]
    owner = names // base
    sizes = torch.bincount(owner, minlength=batch.num_groups)
    place = torch.arange(names.numel(), device=names.device) - (sizes.cumsum(0) - sizes)[owner]
    ids = names.new_full((batch.num_groups, int(sizes.max()) if batch.num_groups else 0), -1)
    ids[owner, place] = names % base
    column = torch.empty_like(taken, dtype=torch.int32).index_copy_(0, names + 1, place.int())
    column[0] = -1
    return ids, column.index_select(0, cell).long()


def group_probs(logits: Tensor, batch: Rollouts) -> Tensor:
    """Probabilities of the tokens of :func:`group_vocabulary`, not renormalised, where the policy chose; ``[N, K]``.

    Args:
        logits: float ``[N, V]`` or ``(B, T, V)``, each position's logits for the token that stands there.
        batch: the rollouts.
    """
    logits = logits.reshape(batch.num_tokens, logits.shape[-1])
    ids, _ = group_vocabulary(batch)
    group = ops.spread(batch.group_index, batch.rows, batch.tokens)
    ids = ids[group] if batch.num_groups else ids.new_empty(batch.num_tokens, 0)
    log_p = logits.gather(1, ids.clamp(min=0)) - normalisers(logits, batch)[:, None]
    return torch.where((ids >= 0) & batch.response_mask[:, None], log_p.exp(), 0)
