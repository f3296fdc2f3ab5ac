"""Credit from the share that each token's gradient has in the likelihood of the group's correct rows.

With h the final hidden state and ``g = onehot(token) - p`` the prediction error at a token, two tokens pull on each
other's likelihood by ``<g, g'> <h, h'>``. Summed over the tokens of all correct rows this is a product with one matrix
per group, ``s = g^T (sum w g' h'^T) h``.
"""

from __future__ import annotations

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
    _, column = policy.group_vocabulary(batch)
    if batch.num_tokens and int(column.max()) >= probs.shape[1]:
        raise ValueError(f"token_probs: expected at least {int(column.max()) + 1} columns, got {probs.shape[1]}")
    row = ops.spread(torch.arange(batch.num_rows, device=correct.device), batch.rows, batch.tokens)
    taking_part = batch.response_mask.nonzero()[:, 0]
    group = batch.group_index[row[taking_part]]
    taking_part = taking_part[group.argsort(stable=True)]
    out = torch.zeros(batch.num_tokens, dtype=dtype, device=hidden.device)
    weight = torch.where(correct & (_share(batch, correct) < 1), row_weights.to(dtype), 0)
    for tokens in taking_part.split(torch.bincount(group, minlength=batch.num_groups).tolist()):
        h, error = hidden[tokens].to(dtype), -probs[tokens].to(dtype)
        error.scatter_add_(1, column[tokens, None], error.new_ones(len(tokens), 1))
        w = weight[row[tokens]]
        pulling = w > 0
        pull = error[pulling].T @ (h[pulling] * w[pulling, None])
        out[tokens] = ((error @ pull) * h).sum(1)
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
        mixed = _spread(((_share(batch, correct) < 1) & tau.isfinite())[:, None], batch)
        signed = influence * _spread(torch.where(correct, 1.0, -1.0).to(influence.dtype)[:, None], batch)
        scale = (signed.abs() > _spread(tau[:, None], batch)) * (1 + self.favour * signed.sign())
        paid = _spread(self.of(batch), batch)
        return torch.where(mixed, scale.to(paid.dtype) * paid, paid)


@dataclass(frozen=True)
class sparing(Choice):
    """Another credit, reduced at the tokens of wrong rows that pull the group's correct rows up.

    Where ``s > tau`` in a wrong row, with ``w = 1``, the token is paid ``|1 - 2 p| A``, p being the share of correct
    rows; ``tau = beta`` times the least mean influence of a correct row. Groups all correct or all wrong keep their
    credit.
    """

    of: Credit = field(default_factory=group_normalized)
    beta: float = 1.0
    threshold: float = 0.5
    reads: ClassVar[frozenset[str]] = _READS

    def __call__(self, batch: Rollouts) -> Tensor:
        correct = batch.rewards > self.threshold
        influence = _influence(batch, correct, torch.ones_like(batch.lengths))
        tau = self.beta * _weakest(batch, influence, correct)
        share = _share(batch, correct)
        reduced = _spread((~correct & (share > 0))[:, None], batch) & (influence > _spread(tau[:, None], batch))
        paid = _spread(self.of(batch), batch)
        return torch.where(reduced, _spread((1 - 2 * share).abs()[:, None], batch).to(paid.dtype) * paid, paid)
