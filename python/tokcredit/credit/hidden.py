"""Credit from the share that each token's gradient has in the likelihood of the group's correct rows.

With h the final hidden state and ``g = onehot(token) - p`` the prediction error at a token, two tokens pull on each
other's likelihood by ``<g, g'> <h, h'>``. Summed over the tokens of all correct rows this is a product with one matrix
per group, ``s = g^T (sum w g' h'^T) h``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops, policy, segment
from tokcredit.choice import Choice
from tokcredit.credit.group import Credit, group_normalized, group_size
from tokcredit.rollouts import Rollouts
from tokcredit.segment import Ids

_READS = frozenset({"hidden_states", "token_probs"})


def _influence(batch: Rollouts, correct: Tensor, row_weights: Tensor) -> Tensor:
    """``s`` of each token, ``[N]``: over correct rows, ``sum_i w_i sum_k <g_ik, g> <h_ik, h>``.

    0 where masked, and in groups all correct or all wrong.
    """
    hidden, probs = batch.evidence("hidden_states"), batch.evidence("token_probs")
    dtype = torch.float64 if torch.float64 in (hidden.dtype, probs.dtype) else torch.float32
    ids, column = policy.group_vocabulary(batch)
    if ids.shape[1] > probs.shape[1]:
        raise ValueError(f"token_probs: expected at least {ids.shape[1]} columns, got {probs.shape[1]}")
    weight = torch.where(correct & (_share(batch, correct) < 1), row_weights, 0)
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


def _weakest(batch: Rollouts, influence: Tensor, correct: Tensor) -> Tensor:
    """Least mean influence among the group's correct rows, ``[R]``; inf where it has none."""
    taken = Ids(batch.group_index, batch.num_groups, correct & (batch.lengths > 0))
    return segment.minimum(segment.mean(influence, batch.rows), taken)[batch.group_index]


def _share(batch: Rollouts, correct: Tensor) -> Tensor:
    """Share of correct rows in the row's group, ``[R]``."""
    groups = Ids(batch.group_index, batch.num_groups)
    return segment.sum(correct.float(), groups)[batch.group_index] / group_size(batch)


def _spread(x: Tensor, batch: Rollouts) -> Tensor:
    return x if x.dim() == 1 else ops.spread(x[:, 0], batch.rows, batch.tokens)


@dataclass(frozen=True)
class influential(Choice):
    """Another credit, kept only at tokens of large influence on the group's correct rows, and scaled by its sign.

    ``H = s`` in a correct row and ``-s`` in a wrong one, with ``w = 1 / L`` for a correct row of L tokens. Where
    ``|H| > tau`` the token is paid ``(1 + favour sign(H)) A``, else 0; ``tau = beta`` times the least mean influence
    of a correct row of the group, at least 0. Groups all correct or all wrong keep their credit.
    """

    of: Credit = field(default_factory=group_normalized)
    favour: float = 0.1
    beta: float = 1.0
    threshold: float = 0.5
    reads: ClassVar[frozenset[str]] = _READS

    def __call__(self, batch: Rollouts) -> Tensor:
        correct = batch.rewards > self.threshold
        influence = _influence(batch, correct, 1 / batch.lengths.clamp(min=1))
        tau = self.beta * _weakest(batch, influence, correct).clamp(min=0)
        # Infinite: the group's correct rows have no token, so there is nothing to move.
        mixed = (_share(batch, correct) < 1) & tau.isfinite()
        lean = torch.where(mixed, torch.where(correct, self.favour, -self.favour), 0).to(influence.dtype)
        scale = influence.sign().mul_(_spread(lean[:, None], batch)).add_(1)
        scale.mul_(influence.abs() > _spread(torch.where(mixed, tau, -1)[:, None], batch))
        paid = _spread(self.of(batch), batch)
        return scale.to(paid.dtype) * paid


@dataclass(frozen=True)
class sparing(Choice):
    """Another credit, reduced at the tokens of wrong rows that pull the group's correct rows up.

    Where ``s > tau`` in a wrong row, with ``w = 1``, the token is paid ``|1 - 2 p| A``, p being the share of correct
    rows; ``tau = beta`` times the least mean influence of a correct row, at least 0. Groups all correct or all wrong
    keep their credit.
    """

    of: Credit = field(default_factory=group_normalized)
    beta: float = 1.0
    threshold: float = 0.5
    reads: ClassVar[frozenset[str]] = _READS

    def __call__(self, batch: Rollouts) -> Tensor:
        correct = batch.rewards > self.threshold
        influence = _influence(batch, correct, torch.ones_like(batch.lengths))
        tau = self.beta * _weakest(batch, influence, correct).clamp(min=0)
        share = _share(batch, correct)
        spared = torch.where(~correct & (share > 0), tau, math.inf)
        reduced = influence > _spread(spared[:, None], batch)
        scale = torch.where(reduced, _spread((1 - 2 * share).abs()[:, None], batch), 1)
        paid = _spread(self.of(batch), batch)
        return scale.to(paid.dtype) * paid
