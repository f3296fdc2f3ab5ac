"""Credit from values of the states along a row: what each stretch of tokens changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import length, ops, segment
from tokcredit.choice import Choice
from tokcredit.credit.group import Credit, group_normalized, outcome
from tokcredit.rollouts import Rollouts


def improbable_cuts(batch: Rollouts, below: float = 0.9, interval: int = 5) -> Tensor:
    """Tokens before which a state should be valued: of those less probable than ``below``, every ``interval``-th.

    The first of a row is taken. Reads ``old_log_probs``; bool ``[N]``.

    References:
        arXiv 2505.23564.
    """
    if interval < 1:
        raise ValueError(f"interval: expected at least 1, got {interval}")
    low = batch.response_mask & batch.improbable(below)
    rank = ops.scan(low.float(), batch.rows, exclusive=True)[0].long()
    return low & (rank % interval == 0)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class value_changes(Choice):
    """What a stretch of tokens adds to the value of the state; the reward is the value at the end.

    A stretch begins at every token before which the state has a value (the evidence ``name`` is not NaN) and gets the
    value at the next such token minus its own. Tokens before the first get 0.
    """

    name: str = "state_values"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.name})

    def __call__(self, batch: Rollouts) -> Tensor:
        value = batch.evidence(self.name)
        stretch = segment.pieces(batch.response_mask & ~value.isnan(), batch.rows)
        before = _float(stretch.take(value))
        after = before.roll(-1).index_copy_(0, stretch.offsets[1:] - 1, batch.rewards.to(before.dtype))
        change = torch.where(stretch.marked, after - before, 0)
        return ops.spread(change, stretch.rows, batch.tokens)


@dataclass(frozen=True)
class saturating(Choice):
    """The outcome, faded out once the row's potential has saturated, plus a bonus for steps that raise the potential.

    A step ends at a token with evidence; what follows the last one belongs to it. With ``a`` the probability of the
    true answer and ``c`` the confidence in some answer after step k::

        phi = 1.5 a c + 0.5 a - c
        fade = 1 - alpha (1 - exp(-(steps before k with phi > saturated)))
        jump = exp(minmax(phi_k - phi_(k-1)))              # over the steps of the batch; a first step changes 0
        A = (r - mean) fade + bonus (jump - mean of jump over the tokens of the batch)
    """

    alpha: float = 0.5
    bonus: float = 0.5
    saturated: float = 0.9
    reads: ClassVar[frozenset[str]] = frozenset({"answer_probs", "answer_confidences"})
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        a, c = batch.evidence("answer_probs"), batch.evidence("answer_confidences")
        marks = batch.response_mask & ~(a.isnan() | c.isnan())
        step = segment.pieces(marks, batch.rows, after=True)
        a, c = _float(step.take(a)), _float(step.take(c))
        phi = 1.5 * a * c + 0.5 * a - c
        # The piece after a row's last step is part of it, and the only piece of a row without steps.
        last = step.offsets[1:] - 1
        has_steps = last > step.offsets[:-1]
        final = torch.where(has_steps, last - 1, last)
        before = ops.scan((phi > self.saturated).to(phi.dtype), step.of_row(step.marked), exclusive=True)[0]
        change = (phi - phi.roll(1)).index_fill_(0, step.offsets[:-1], 0)
        counted = segment.whole(phi, step.marked.index_fill(0, final, True))
        low = segment.minimum(change, counted)
        width = segment.maximum(change, counted) - low
        jump = torch.where(width > 0, (change - low) / width, 0).exp()
        fade = 1 - self.alpha * (1 - (-before).exp())
        jump.index_copy_(0, last, jump[final])
        fade.index_copy_(0, last, fade[final])
        mean = (jump * ops.count(step.rows, batch.tokens)).sum() / batch.lengths.sum().clamp(min=1)
        paid = ops.spread(outcome(batch), step.of_row(), fade) * fade + self.bonus * (jump - mean)
        return ops.spread(paid, step.rows, batch.tokens)


@dataclass(frozen=True)
class turns(Choice):
    """Rewards of the whole row plus discounted rewards from the turn on, each normalised among the group's rows.

    A turn is a maximal run of tokens the policy chose; ``turn_rewards`` are summed over it. With R the sum over turns
    and ``R[t] = r[t] + discount R[t + 1]``: ``A = (R - mean) / (std + epsilon) + (R[t] - mean) / (std + epsilon)``, the
    second over the rows of the group that have a turn t. Sample standard deviations; among one row mean 0 and std 1,
    or with ``centre_alone`` its own mean. ``halve`` divides the sum by 2.
    """

    discount: float = 0.9
    epsilon: float = 1e-6
    halve: bool = False
    centre_alone: bool = False
    reads: ClassVar[frozenset[str]] = frozenset({"turn_rewards"})

    def __call__(self, batch: Rollouts) -> Tensor:
        mask, reward = batch.response_mask, batch.evidence("turn_rewards")
        begins = mask.clone()
        begins[1:] &= ~mask[:-1]
        first = batch.begin[batch.begin < batch.end]
        begins[first] = mask[first]
        turn = segment.pieces(begins, batch.rows)
        each = segment.sum(reward, turn.rows)
        later = ops.scan(each, turn.of_row(), decay=self.discount, reverse=True)[0]
        # The piece before the first turn is empty, and is given to no scope.
        number = torch.arange(each.numel(), device=mask.device) - ops.spread(turn.offsets[:-1], turn.of_row(), each)
        most = int(number.max()) + 1 if number.numel() else 1
        scope = ops.spread(batch.group_index, turn.of_row(), each) * most + number
        local = self._normalized(later, torch.where(turn.marked, scope, -1))
        whole = self._normalized(segment.sum(reward, batch.rows), batch.group_index)
        total = ops.spread(whole, turn.of_row(), each) + local
        return ops.spread(total / 2 if self.halve else total, turn.rows, batch.tokens)

    def _normalized(self, x: Tensor, scope: Tensor) -> Tensor:
        by = segment.Ids(scope, int(scope.max()) + 1 if scope.numel() else 0)
        if by.segments <= 0:
            return torch.zeros_like(x)
        index = scope.clamp(min=0)
        alone = segment.count(x, by)[index] < 2
        mean = segment.mean(x, by)[index]
        std = torch.where(alone, 1, segment.var(x, by).sqrt()[index])
        if not self.centre_alone:
            mean = torch.where(alone, 0, mean)
        return torch.where(scope >= 0, (x - mean) / (std + self.epsilon), 0)


@dataclass(frozen=True)
class shortening(Choice):
    """Another credit plus ``scale`` times how much shorter than predicted each token made the row.

    ``length_values`` are ``-(1 - gamma^l)``, l being the predicted tokens to go; the added term is their generalized
    advantage (:func:`tokcredit.length.advantages`), in which rows ``truncated`` go on as predicted. A negative scale
    lengthens.
    """

    of: Credit = field(default_factory=group_normalized)
    scale: float = 0.1
    gamma: float = 0.997
    trace: float = 1.0
    reads: ClassVar[frozenset[str]] = frozenset({"length_values", "truncated"})

    def __call__(self, batch: Rollouts) -> Tensor:
        paid, value = self.of(batch), batch.evidence("length_values")
        if paid.dim() == 2:
            paid = ops.spread(paid[:, 0], batch.rows, batch.tokens)
        shorter = length.advantages(value, batch.rows, self.gamma, self.trace, batch.evidence("truncated"))
        return torch.add(paid, shorter, alpha=self.scale)
