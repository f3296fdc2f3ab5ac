"""Multi-turn GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import number
from tokcredit.stages.credit import Credit


@dataclass(frozen=True)
class first_turn(Credit):
    """GRPO's advantage of the outcome, plus in the first turn that of its reward, as in :func:`mt_grpo`.

    Args:
        weight: Factor of the advantage of the first turn, the released code's ``turn_advantage_coef``.
        epsilon: Added to the standard deviations, at least 0.
    """

    weight: float = number(1.0)
    epsilon: float = number(1e-4, at_least=0)
    reads: ClassVar[frozenset[str]] = frozenset({"token_rewards"})

    def __call__(self, batch: Rollouts) -> Tensor:
        turns = batch.turns
        each = segment.sum(batch.input("token_rewards").double(), turns.spans)
        judged = torch.zeros(batch.num_rows, dtype=each.dtype, device=each.device)
        at = (turns.number == 0).nonzero()[:, 0]
        judged = judged.index_copy(0, turns.row.index_select(0, at), each.index_select(0, at))
        turn, outcome, both = (self._normalized(x, batch) for x in (judged, batch.outcome_rewards, batch.rewards))
        before = torch.where(turns.counts > 1, outcome + self.weight * turn, both).index_select(0, turns.row)
        after = outcome.index_select(0, turns.row)
        return ops.spread(torch.where(turns.number == 0, before, after), turns.spans).to(batch.rewards.dtype)

    def _normalized(self, x: Tensor, batch: Rollouts) -> Tensor:
        groups = batch.nonempty_groups
        moments = segment.moment_table(x, groups)
        return segment.standardize(x, groups.index, moments, "normalized", self.epsilon, torch.float64)


def mt_grpo(weight: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-4) -> Objective:
    """MT-GRPO: a tool call is judged by its own reward and by the outcome, what follows its result by the outcome.

    With ``n(x) = (x - mean(x)) / (std(x) + epsilon)`` over the group, ``q`` the ``token_rewards`` of the first turn,
    ``r`` the outcome and ``R`` the total reward::

        A = n(r) + weight * n(q)    in the first turn
        A = n(r)                    in later turns
        A = n(R)                    in a trajectory of one turn, which called no tool

    Args:
        weight: Factor of the first turn's advantage, the paper's lambda.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviations.

    Cost: The same as GRPO.
    References: arXiv 2505.11821.
    Differences from the paper:
        - Rewards of later turns count in the total reward only. For a return of every turn whose baseline does not
          depend on the number of turns: ``tokcredit.mix("mt_grpo", credit="returns(unit=turn, baseline=others)")``.
    Differences from the released code:
        - The first turn ends where the turns of the batch say so; the release looks for a message with ``<result>``.
        - The rewards of a trajectory of one turn are their sum; the release has a list of reward functions for it.
    """
    return Objective(
        first_turn(weight, epsilon), clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.token_mean()
    )
