"""Log-probabilities, entropies and squared probabilities of tokens from the logits of a language model.

No float32 copy of the ``(N, V)`` logits is made, forward or backward; two numbers per position are kept beside them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import INTEGERS, describe, float_tensor, instance
from tokcredit.rollouts import Rollouts


def _check(logits: Tensor, tokens: Tensor, temperature: float) -> None:
    if not isinstance(logits, Tensor) or not isinstance(tokens, Tensor):
        wrong = "tokens" if isinstance(logits, Tensor) else "logits"
        raise TypeError(f"{wrong}: expected torch.Tensor, got {type(tokens if wrong == 'tokens' else logits).__name__}")
    if logits.dim() == 0 or logits.shape[:-1] != tokens.shape:
        expected = "at least one dimension" if logits.dim() == 0 else f"{list(logits.shape[:-1])}"
        raise ValueError(f"tokens: expected the shape of logits without V, {expected}, got {list(tokens.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a float dtype, got {describe(logits)}")
    if tokens.dtype not in INTEGERS:
        raise TypeError(f"tokens: expected int32 or int64, got {describe(tokens)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


def _rows(logits: Tensor) -> Tensor:
    """Return logits ``(..., V)`` as ``[N, V]`` or ``(B, T, V)``."""
    return logits.reshape(math.prod(logits.shape[:-2]), *logits.shape[-2:]) if logits.dim() != 2 else logits


def with_entropies(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each token and the entropy of the distribution it comes from, in nats.

    With ``p = softmax(logits[i] / temperature)``::

        log_probs[i] = log(p[tokens[i]])
        entropies[i] = -sum(p[j] * log(p[j]) for j in range(V))

    A token of -1 marks a position that takes no part: both results and the gradient are 0 there, and its logits are not
    read. A slice of logits such as ``logits[:, :-1]`` or ``logits[..., :V]`` is not copied. A position whose incoming
    gradient is 0 gets a gradient of 0, whatever its logits hold.

    Args:
        logits: float ``(..., V)``; bf16 and fp16 are computed in float32. A logit of -inf has probability 0.
        tokens: int64 or int32 ``(...)``, -1 or an id below V.
        temperature: Positive; what the logits were divided by when the tokens were sampled.
        overwrite: Whether the backward pass may write the gradient over the logits, which saves a second ``(N, V)``.
            Use it where nothing else reads the logits. A second backward pass then raises an error.

    Returns:
        Two tensors ``(...)``, float32, or float64 for float64 logits. Both have a gradient to the logits.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes disagree, a token is out of range (on the CPU), or the temperature is not positive.
    """
    _check(logits, tokens, temperature)
    rows = ops.LogitRows(tokens.reshape(-1), float(temperature))
    log_probs, entropies, *_ = ops.logits(_rows(logits), rows, overwrite=overwrite)
    return log_probs.view(tokens.shape), entropies.view(tokens.shape)


def from_logits(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each token, ``log softmax(logits / temperature)[token]``.

    Args:
        logits: float ``(..., V)``.
        tokens: int64 or int32 ``(...)``, -1 where a position takes no part.
        temperature: Positive.

    Returns:
        ``(...)``, float32, or float64 for float64 logits, with a gradient to the logits.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: As :func:`with_entropies`.
    """
    return with_entropies(logits, tokens, temperature)[0]


@torch.no_grad()
def squared_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the sum over the vocabulary of squared probabilities, ``sum(p[j] ** 2)``, without gradient.

    Args:
        logits: float ``(..., V)``.
        tokens: int64 or int32 ``(...)``, -1 where a position takes no part (its result is 0); any other id otherwise.
        temperature: Positive.

    Returns:
        ``(...)``, float32, or float64 for float64 logits.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes disagree, or the temperature is not positive.
    """
    _check(logits, tokens, temperature)
    # Which token stands there does not matter.
    rows = ops.LogitRows(tokens.reshape(-1).clamp(-1, 0), float(temperature))
    squares = ops.logits_forward(_rows(logits), rows, squares=True).squares
    assert squares is not None
    return squares.view(tokens.shape)


def normalizers(logits: Tensor, batch: Rollouts) -> Tensor:
    """Return ``log(sum(exp(logits)))`` of each token that the policy chose, and 0 elsewhere.

    Args:
        logits: float ``[N, V]``, each position's logits for the token that stands there.
        batch: The rollouts.

    Returns:
        float ``[N]``.
    """
    instance("batch", batch, Rollouts)
    float_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[0] != batch.num_tokens:
        raise ValueError(f"logits: expected float [{batch.num_tokens}, V], got {describe(logits)}")
    chosen = torch.where(batch.response_mask, batch.tokens.long(), -1)
    own = logits.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
    return torch.where(batch.response_mask, own - from_logits(logits, chosen), 0)


def group_vocabulary(batch: Rollouts) -> tuple[Tensor, Tensor]:
    """Return the distinct tokens that the rows of each group chose, and the column of each token among them.

    It takes five bytes of memory for each group and each id up to the largest. On CUDA it waits for the device.

    Args:
        batch: The rollouts.

    Returns:
        int64 ``[groups, K]``, ascending token ids of each group, then -1; and int64 ``[N]``, the column of each token,
        -1 where the policy did not choose it.
    """
    instance("batch", batch, Rollouts)
    chosen = batch.tokens.masked_fill(~batch.response_mask, 0)
    base = int(chosen.max()) + 1 if batch.num_tokens else 1
    # One cell for every group and id, and cell 0 for tokens that the policy did not choose.
    cell = ops.spread(batch.group_index * base + 1, batch.spans).add_(chosen)
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
    """Return, for each token the policy chose, the probabilities of the tokens of :func:`group_vocabulary`.

    They are not renormalized over these K tokens.

    Args:
        logits: float ``[N, V]`` or ``(B, T, V)``, each position's logits for the token that stands there.
        batch: The rollouts.

    Returns:
        float ``[N, K]``, 0 where the policy did not choose the token.
    """
    instance("batch", batch, Rollouts)
    if float_tensor("logits", logits).dim() == 0 or logits.numel() != batch.num_tokens * logits.shape[-1]:
        raise ValueError(f"logits: expected float [{batch.num_tokens}, V], got {describe(logits)}")
    logits = logits.reshape(batch.num_tokens, logits.shape[-1])
    ids, _ = group_vocabulary(batch)
    group = ops.spread(batch.group_index, batch.spans)
    ids = ids[group] if batch.num_groups else ids.new_empty(batch.num_tokens, 0)
    rows = ops.LogitRows(torch.where(batch.response_mask, 0, -1), chosen=ids)
    chosen = ops.logits(logits, rows)[3]
    assert chosen is not None
    return torch.where((ids >= 0) & batch.response_mask[:, None], chosen.exp(), 0)
