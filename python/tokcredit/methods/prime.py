"""Process reinforcement through implicit rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip, credit
from tokcredit.stages.base import number
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.returns import last_tokens
from tokcredit.stages.filters import Filter


@dataclass(frozen=True)
class accuracy_within(Filter):
    """The groups whose mean reward lies in ``[low, high]``.

    Args:
        low: Lower bound.
        high: Upper bound.

    Raises:
        ValueError: ``low`` exceeds ``high``.
    """

    low: float = number(0.2)
    high: float = number(0.8)
    before_credit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(f"accuracy_within: low: expected at most high, {self.high}, got {self.low}")

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        groups = batch.nonempty_groups
        mean = segment.mean(batch.rewards.double(), groups)
        inside = (mean >= self.low - 1e-9) & (mean <= self.high + 1e-9)  # a share like 4 of 5 is not exactly 0.8
        return groups.per_row(inside)[:, None]


@dataclass(frozen=True)
class implicit_process(Credit):
    """Implicit rewards and outcomes to go, minus means of the other trajectories of the group; see :func:`prime`.

    Args:
        beta: Factor of the implicit rewards.
        process: Factor of the implicit rewards to go.
        outcome: Factor of the outcome.

    Raises:
        ValueError: A group has a single trajectory.
    """

    beta: float = number(0.05, above=0)
    process: float = number(5.0)
    outcome: float = number(5.0)
    reads: ClassVar[frozenset[str]] = frozenset({"implicit_rewards"})
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        groups, spans = batch.nonempty_groups, batch.spans
        size = groups.per_row(groups.counts).double()
        if bool((batch.nonempty & (size < 2)).any()):
            raise ValueError("group_ids: expected at least two trajectories in each group for prime, got one")
        rows, last = last_tokens(batch)
        given = batch.input("implicit_rewards")
        q = (self.beta * given.double()).masked_fill_(~batch.response_mask, 0).index_fill_(0, last, 0)
        size_to_go = ops.scan(q, spans, reverse=True)[0].abs_()
        q /= segment.maximum(size_to_go, Spans.single(len(q), batch.device)).clamp(min=0) + 1e-6
        others = (size - 1).clamp(min=1)
        own = size / others

        def mean_of_others(x: Tensor) -> Tensor:
            return groups.per_row(segment.sum(x, groups)) / others

        shift = -self.process * mean_of_others(segment.mean(q, spans))
        dense = ops.row_affine(q, self.process * own, shift, spans)
        accuracy = batch.rewards.double()
        final = (own * accuracy - mean_of_others(accuracy)).index_select(0, rows)
        rewards = dense.index_add(0, last, self.outcome * final)
        return ops.scan(rewards, spans, reverse=True)[0].to(torch.promote_types(given.dtype, batch.rewards.dtype))


def outcome_loss(log_ratio: Tensor, spans: Spans, outcomes: Tensor, beta: float = 0.05) -> Tensor:
    """Return the loss of the implicit reward model: cross entropy of the outcomes under its total rewards.

    With ``x`` the log-ratio of the model to its reference, the mean over the rows of::

        p = sigmoid(beta * sum of x[t]);   loss = -R * log p - (1 - R) * log(1 - p)

    Args:
        log_ratio: float ``[N]``, with gradient; not read where masked.
        spans: The rows; those without a token that the policy chose do not count.
        outcomes: float ``[R]``, R from 0 to 1.
        beta: Factor of the log-ratio, above 0.

    Returns:
        float, 0-d, with gradient; 0 without rows.

    Raises:
        ValueError: An outcome is not from 0 to 1.

    References:
        arXiv 2502.01456.
    """
    counts = ops.count(spans) > 0
    given = outcomes[counts]
    if wrong := given[~((given >= 0) & (given <= 1))].tolist():
        raise ValueError(f"outcomes: expected numbers from 0 to 1, got {wrong[0]}")
    total = segment.sum(log_ratio, spans)[counts]
    losses = functional.binary_cross_entropy_with_logits(beta * total, given.to(total.dtype), reduction="sum")
    return losses / counts.sum().clamp(min=1)


def prime(
    beta: float = 0.05,
    process: float = 5.0,
    outcome: float = 5.0,
    low: float = 0.2,
    high: float = 0.8,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Objective:
    """PRIME: implicit rewards of tokens from a reward model that is trained on outcomes, and the outcome.

    With ``x`` the ``implicit_rewards``, n trajectories in the group and ``m`` the mean of q over the tokens of one::

        q = beta * x, 0 at the last token;  q = q / (largest |sum of q from a token on| of the batch + 1e-6)
        P[t] = n / (n - 1) * q[t] - sum over the group of m / (n - 1)
        O = n / (n - 1) * R - sum over the group of R / (n - 1)           at the last token
        A = whiten(sum from t on of process * P + outcome * O)

    Groups whose mean reward is outside of ``[low, high]`` are left out. P subtracts the same number at each token, so
    the advantage depends on how many tokens follow. ``outcome_loss`` of this module is the loss of the reward model.

    Args:
        beta: Factor of the implicit rewards, above 0.
        process: Factor of P.
        outcome: Factor of O.
        low: Least mean reward of a group that trains.
        high: Largest mean reward of a group that trains.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: GRPO plus forward passes of a reward model and its reference, and training of the reward model.
    References: arXiv 2502.01456.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - The last token is the last one that the policy chose. The release takes the last one with attention, at which
          an outcome can be lost after a tool's reply.
        - Groups are those of the batch; the release takes them by position.
    """
    return Objective(
        credit.whitened(implicit_process(beta, process, outcome)),
        filters=(accuracy_within(low, high),),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
