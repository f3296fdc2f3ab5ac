"""How strongly a gradient step on one token changes the likelihood of the correct rows of its group.

With h the final hidden state and ``g = onehot(token) - p`` the prediction error at a token, two tokens change each
other's likelihood by ``<g, g'> <h, h'>``. Summed over the tokens of all correct rows this is a product with one matrix
per group, ``s = g^T (sum w g' h'^T) h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit.blocks import log_probs, segment
from tokcredit.rollouts import Rollouts

READS = frozenset({"hidden_states", "token_probs"})
"""Inputs that :func:`influence` reads."""


def influence(batch: Rollouts, correct: Tensor, row_weights: Tensor) -> Tensor:
    """Return the influence of each token: ``sum_i w_i sum_k <g_ik, g> <h_ik, h>`` over the correct rows i.

    On CUDA this waits for the device.

    Args:
        batch: The rollouts, with ``hidden_states`` and ``token_probs``.
        correct: bool ``[R]``.
        row_weights: float ``[R]``, w of each row.

    Returns:
        float ``[N]``, 0 where masked, and in groups in which all or no rows are correct.
    """
    hidden, probs = batch.input("hidden_states"), batch.input("token_probs")
    dtype = torch.float64 if torch.float64 in (hidden.dtype, probs.dtype) else torch.float32
    ids, column = log_probs.group_vocabulary(batch)
    if ids.shape[1] > probs.shape[1]:
        raise ValueError(f"token_probs: expected at least {ids.shape[1]} columns, got {probs.shape[1]}")
    weight = torch.where(correct & (correct_share(batch, correct) < 1), row_weights, 0)
    members: list[list[tuple[Tensor, int, float]]] = [[] for _ in range(batch.num_groups)]
    table = torch.stack([batch.group_index, batch.lengths, weight.double()]).tolist()
    of_rows = batch.response_mask.nonzero()[:, 0].split([int(n) for n in table[1]])
    for tokens, g, n, w in zip(of_rows, *table, strict=True):
        members[int(g)].append((tokens, int(n), w))
    out = torch.zeros(batch.num_tokens, dtype=dtype, device=hidden.device)
    for rows in members:
        if not any(w for _, _, w in rows):
            continue
        tokens = torch.cat([tokens for tokens, _, _ in rows])
        h, error = (x.index_select(0, tokens).to(dtype) for x in (hidden, probs))
        own = column.index_select(0, tokens)[:, None]
        error.neg_().scatter_add_(1, own, error.new_ones(own.shape))
        pull, sizes = h.new_zeros(error.shape[1], h.shape[1]), [n for _, n, _ in rows]
        for own_h, own_error, (_, _, w) in zip(h.split(sizes), error.split(sizes), rows, strict=True):
            if w:
                pull.addmm_(own_error.T, own_h, alpha=w)
        out[tokens] = (error @ pull).mul_(h).sum(1)
    return out


def least_mean_influence(batch: Rollouts, influence: Tensor, correct: Tensor) -> Tensor:
    """Return the least mean influence among the correct rows of each row's group; inf where there is none.

    Args:
        batch: The rollouts.
        influence: From :func:`influence`.
        correct: bool ``[R]``.

    Returns:
        float ``[R]``.
    """
    counted = batch.groups.counting(correct & (batch.lengths > 0))
    return batch.groups.per_row(segment.minimum(segment.mean(influence, batch.spans), counted))


def correct_share(batch: Rollouts, correct: Tensor) -> Tensor:
    """Return the share of correct rows in each row's group, float64 ``[R]``.

    Args:
        batch: The rollouts.
        correct: bool ``[R]``.
    """
    groups = batch.nonempty_groups
    return groups.per_row(segment.mean(correct.double(), groups))
