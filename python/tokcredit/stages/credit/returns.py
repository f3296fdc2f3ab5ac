"""Credit from rewards to go: returns over tokens or turns, minus a baseline or a critic's values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import scan, segment
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages.base import flag, number, option
from tokcredit.stages.credit.group import Credit
from tokcredit.turns import Turns

KL_INPUTS = frozenset({"old_log_probs", "ref_log_probs"})
"""Inputs of a KL penalty in the rewards."""


def last_tokens(batch: Rollouts) -> tuple[Tensor, Tensor]:
    """Return the trajectories with a token that the policy chose, and the last such token of each, int64 ``[M]``.

    Args:
        batch: The rollouts, each row a trajectory.
    """
    places = torch.arange(batch.num_tokens, dtype=torch.float64, device=batch.device)
    last = segment.maximum(places, batch.spans)
    rows = (last >= 0).nonzero()[:, 0]
    return rows, last.index_select(0, rows).long()


def rewards_of_tokens(batch: Rollouts, kl: float = 0.0) -> Tensor:
    """Return the reward of each token: ``token_rewards``, the outcome at the last token of a trajectory, a KL penalty.

    The penalty is ``kl * (old_log_probs - ref_log_probs)``.

    Args:
        batch: The rollouts, each row a trajectory.
        kl: Factor of the penalty.

    Returns:
        float ``[N]``, 0 at tokens that the policy did not choose.
    """
    outcome, dense = batch.outcome_rewards, batch.token_rewards
    given = [outcome, *(x for x in (dense,) if x is not None)]
    given += [batch.input(name) for name in sorted(KL_INPUTS)] if kl else []
    dtype = reduce(torch.promote_types, (x.dtype for x in given))
    final = at_last_tokens(outcome.to(dtype), batch.spans)
    if dense is None and not kl:
        return final
    rewards = torch.zeros_like(final) if dense is None else dense.to(dtype)
    if kl:
        rewards = rewards - kl * (batch.input("old_log_probs").to(dtype) - batch.input("ref_log_probs"))
    return (rewards + final).masked_fill_(~batch.response_mask, 0)


def at_last_tokens(x: Tensor, spans: Spans) -> Tensor:
    """Return each row's number at its last unmasked token and 0 elsewhere, ``[N]``.

    Args:
        x: float32 or float64 ``[R]``.
        spans: The rows.
    """
    return scan.following(x.new_zeros(spans.size), spans, x)


@dataclass(frozen=True, eq=False)
class Steps:
    """The time steps of trajectories: their tokens, or their turns.

    Attributes:
        spans: The steps of each trajectory, in a buffer of S steps; steps that do not count are masked.
        turns: The turns, or None where steps are tokens.
    """

    spans: Spans
    turns: Turns | None

    @classmethod
    def of(cls, batch: Rollouts, unit: str) -> Steps:
        """Return the steps of a batch. On CUDA this waits for the device.

        Args:
            batch: The rollouts, each row a trajectory.
            unit: ``"token"`` or ``"turn"``.
        """
        return cls(batch.turns.of_row(), batch.turns) if unit == "turn" else cls(batch.spans, None)

    @cached_property
    def row(self) -> Tensor:
        """Trajectory of each step; int64 ``[S]``."""
        if self.turns is not None:
            return self.turns.row
        return ops.spread(torch.arange(self.spans.num_rows, device=self.spans.device), self.spans)

    @cached_property
    def number(self) -> Tensor:
        """Number of the step in its trajectory, from 0; -1 where it does not count; int64 ``[S]``."""
        if self.turns is not None:
            return self.turns.number
        return scan.positions(self.spans, torch.float64).long().sub_(1)

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum of a per-token number over the tokens of each step, ``[S]``.

        Args:
            x: float ``[N]``.
        """
        return x if self.turns is None else segment.sum(x, self.turns.spans)

    def per_token(self, x: Tensor) -> Tensor:
        """Return the number of each token's own step, ``[N]``; 0 where masked.

        Args:
            x: float32 or float64 ``[S]``.
        """
        if self.turns is not None:
            return ops.spread(x, self.turns.spans)
        one = x.new_ones((), dtype=torch.float64)
        return ops.row_affine(x, one, torch.zeros_like(one), self.spans)

    def peers(self, batch: Rollouts) -> segment.Ids:
        """Return which steps have the same group and number.

        Args:
            batch: The rollouts.
        """
        width = int(self.number.max()) + 1 if self.number.numel() else 0
        scope = batch.group_index.index_select(0, self.row).mul_(width).add_(self.number)
        return segment.Ids(scope.masked_fill_(self.number < 0, -1), width * batch.num_groups)


@dataclass(frozen=True)
class returns(Credit):
    """The discounted rewards from a token or turn on, minus a baseline from the other trajectories of the group.

    With ``r`` the reward of a step and ``j`` a trajectory of a group of ``n``::

        G[j, k] = r[j, k] + discount * G[j, k + 1]
        A[j, k] = (G[j, k] - b[j, k]) / s

    ====================  ==============================================================
    ``baseline``          ``b[j, k]``
    ====================  ==============================================================
    ``"none"``            0
    ``"others"``          mean of ``G[i, k]`` over the other trajectories with a step k
    ``"inclusive"``       mean of ``G[i, k]`` over all trajectories with a step k
    ====================  ==============================================================

    The return comes first and the baseline after it, so the number of steps, which the policy decides, has no
    advantage of its own. The baseline ``"others"`` has no bias, ``"inclusive"`` makes the gradient smaller by 1 - 1/n.

    Args:
        discount: gamma, from 0 to 1.
        unit: What a step is: ``token`` or ``turn``.
        baseline: ``none``, ``others`` or ``inclusive``.
        zero_extended: Whether a trajectory that has ended counts with ``G = 0`` at later steps.
        alone: A step without others has advantage 0 with ``zero``, and ``b = 0`` with ``raw``.
        scale: ``none`` for ``s = 1``, ``group`` for the sample standard deviation of ``G[i, 0]`` over the group. In a
            group in which ``G[i, 0]`` is the same for all i, within 1e-6 of its size, advantages are 0.
        epsilon: Added to that standard deviation, at least 0.
        kl: Factor of a penalty in the rewards, ``-kl * (old_log_probs - ref_log_probs)`` at every token; at least 0.
    """

    discount: float = number(1.0, at_least=0, at_most=1)
    unit: str = option("token", "turn")
    baseline: str = option("none", "others", "inclusive")
    zero_extended: bool = flag(False)
    alone: str = option("zero", "raw")
    scale: str = option("none", "group")
    epsilon: float = number(1e-6, at_least=0)
    kl: float = number(0.0, at_least=0)

    @property
    def required_inputs(self) -> frozenset[str]:
        """Log-probs of the two policies if there is a KL penalty."""
        return KL_INPUTS if self.kl else frozenset()

    def __call__(self, batch: Rollouts) -> Tensor:
        rewards, steps = rewards_of_tokens(batch, self.kl), Steps.of(batch, self.unit)
        to_go = ops.scan(steps.sums(rewards.double()), steps.spans, decay=self.discount, reverse=True)[0]
        advantages = to_go if self.baseline == "none" else self._centred(batch, to_go, steps)
        if self.scale == "group":
            spread = self._spread(batch, to_go, steps).index_select(0, steps.row)
            advantages = torch.where(spread > 0, advantages / spread, 0)
        return steps.per_token(advantages).to(rewards.dtype)

    def _centred(self, batch: Rollouts, to_go: Tensor, steps: Steps) -> Tensor:
        by = steps.peers(batch)
        own = by.ids.clamp(min=0)
        size, total = segment.count(by)[own].double(), segment.sum(to_go, by)[own]
        if self.zero_extended:
            size = batch.nonempty_groups.counts[batch.group_index].index_select(0, steps.row).double()
        if self.baseline == "inclusive":
            centred = to_go - total / size.clamp(min=1)
        else:
            centred = to_go - (total - to_go) / (size - 1).clamp(min=1)
        return torch.where(size > 1, centred, 0 if self.alone == "zero" else to_go)

    def _spread(self, batch: Rollouts, to_go: Tensor, steps: Steps) -> Tensor:
        first = segment.sum(to_go.masked_fill(steps.number != 0, 0), steps.spans)
        groups = batch.nonempty_groups
        moments = segment.moments(first, groups)
        std = moments.var.sqrt()
        equal = std <= 1e-6 * segment.maximum(first.abs(), groups)
        spread = torch.where(equal, 0, std + self.epsilon).masked_fill(moments.size < 2, 1 + self.epsilon)
        return groups.per_row(spread)


def adaptive_trace(lengths: Tensor, alpha: float) -> Tensor:
    """Return lambda of each trajectory, ``1 - 1 / (alpha * L)``, and 0 where ``alpha * L`` is at most 1.

    Args:
        lengths: int64 ``[R]``, tokens L that the policy chose.
        alpha: Above 0.

    Returns:
        float64 ``[R]``.

    References:
        VAPO, arXiv 2504.05118.
    """
    return 1 - 1 / (alpha * lengths.double()).clamp(min=1)


@dataclass(frozen=True)
class gae(Credit):
    """Generalized advantage estimates from the values of a critic.

    With ``V`` the value before a step and ``r`` its reward, along the trajectory::

        delta[t] = r[t] + discount * V[t + 1] - V[t]
        A[t] = delta[t] + discount * trace * A[t + 1]

    After the last step ``V`` is ``bootstrap_values`` if the batch has them, for trajectories that were cut, else 0. The
    value of a turn is that of its first token.

    Args:
        discount: gamma, from 0 to 1.
        trace: lambda, from 0 to 1.
        unit: What a step is: ``token`` or ``turn``.
        adaptive: If a number alpha, lambda is ``1 - 1 / (alpha * L)`` for a trajectory of L tokens, at least 0, in
            place of ``trace``.
        target_trace: lambda of the estimates that :meth:`targets` are made of.
        kl: Factor of a penalty in the rewards, ``-kl * (old_log_probs - ref_log_probs)`` at every token; at least 0.

    Raises:
        ValueError: The value of a token or turn that the policy chose, or a bootstrap value, is NaN or infinite.

    References:
        Schulman et al., arXiv 1506.02438.
    """

    discount: float = number(1.0, at_least=0, at_most=1)
    trace: float = number(1.0, at_least=0, at_most=1)
    unit: str = option("token", "turn")
    adaptive: float | None = number(None, above=0, optional=True)
    target_trace: float = number(1.0, at_least=0, at_most=1)
    kl: float = number(0.0, at_least=0)
    reads: ClassVar[frozenset[str]] = frozenset({"values"})

    @property
    def required_inputs(self) -> frozenset[str]:
        """``values``, and log-probs of the two policies if there is a KL penalty."""
        return self.reads | KL_INPUTS if self.kl else self.reads

    def __call__(self, batch: Rollouts) -> Tensor:
        trace = self.trace if self.adaptive is None else adaptive_trace(batch.lengths, self.adaptive)
        steps, _, estimates = self._estimates(batch, trace)
        # A scan over tokens gives 0 at those that the mask hides.
        return estimates if steps.turns is None else steps.per_token(estimates)

    def targets(self, batch: Rollouts) -> Tensor:
        """Return what a critic is trained to predict: ``V + A`` with ``target_trace``; float ``[N]``.

        With turns it is meant for the first token of each turn, whose number all tokens of the turn have.

        Args:
            batch: The rollouts, with ``values``.
        """
        whole = batch.whole
        steps, values, estimates = self._estimates(whole, self.target_trace)
        found = steps.per_token(values + estimates)
        return found if batch.trajectories is None else batch.trajectories.divided.of_tokens(found)

    def _estimates(self, batch: Rollouts, trace: float | Tensor) -> tuple[Steps, Tensor, Tensor]:
        rewards, values = rewards_of_tokens(batch, self.kl), batch.input("values")
        steps, dtype = Steps.of(batch, self.unit), torch.promote_types(rewards.dtype, values.dtype)
        if self.unit == "turn":
            values = values.index_select(0, batch.turns.first)
        wrong = ~values.isfinite()
        if self.unit == "token":
            wrong &= ops.spread(torch.ones_like(batch.begin, dtype=torch.bool), batch.spans)
        if bool(wrong.any()):
            raise ValueError(
                f"values: expected finite numbers at tokens that the policy chose, got {values[wrong][0].item()}"
            )
        bootstrap = batch.input("bootstrap_values").to(dtype) if batch.has_input("bootstrap_values") else None
        if bootstrap is not None and bool((wrong := batch.nonempty & ~bootstrap.isfinite()).any()):
            raise ValueError(f"bootstrap_values: expected finite numbers, got {bootstrap[wrong][0].item()}")
        estimates = scan.generalized_advantages(
            steps.sums(rewards.to(dtype)), values.to(dtype), steps.spans, self.discount, trace, bootstrap
        )
        return steps, values.to(dtype), estimates


__all__ = ["adaptive_trace", "gae", "last_tokens", "returns", "rewards_of_tokens"]
