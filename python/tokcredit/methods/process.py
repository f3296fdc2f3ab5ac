"""Process supervision with GRPO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip, credit
from tokcredit.stages.base import number
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.returns import rewards_of_tokens


@dataclass(frozen=True)
class step_normalized(Credit):
    """The sum, from a turn on, of rewards that are normalized over all turns of the group.

    With ``r`` the reward of a turn, the sum of its ``token_rewards`` and in the last turn the outcome::

        z[j, k] = (r[j, k] - mean(r)) / (std(r) + epsilon)
        A[j, k] = z[j, k] + z[j, k + 1] + ...

    Each term has its mean subtracted before the sum, so the advantage depends on how many turns follow.

    Args:
        epsilon: Added to the sample standard deviation, at least 0.
    """

    epsilon: float = number(1e-6, at_least=0)

    def __call__(self, batch: Rollouts) -> Tensor:
        turns, rewards = batch.turns, rewards_of_tokens(batch)
        each = segment.sum(rewards.double(), turns.spans)
        group = batch.group_index.index_select(0, turns.row)
        moments = segment.moment_table(each, segment.Ids(group, batch.num_groups))
        normalized = segment.standardize(each, group, moments, "normalized", self.epsilon)
        return ops.spread(ops.scan(normalized, turns.of_row(), reverse=True)[0], turns.spans).to(rewards.dtype)


def process(
    return_first: bool = False, clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-6
) -> Objective:
    """GRPO with process supervision: rewards of steps, normalized over all steps of the group and summed from there on.

    A step is a turn, and its reward ``r`` the sum of its ``token_rewards``, in the last turn plus the outcome::

        z[j, k] = (r[j, k] - mean(r)) / (std(r) + epsilon)
        A[j, k] = z[j, k] + z[j, k + 1] + ...

    Args:
        return_first: Whether rewards are summed first and centred then, by the mean of the sums from step k on over the
            group: this does not depend on how many steps follow. There is no division then.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.

    Cost: GRPO plus rewards of steps.
    References: DeepSeekMath, section 4.1.3, arXiv 2402.03300.
    Differences from the paper:
        - The paper leaves the kind of standard deviation open. Here it is that of the sample.
    """
    stage = credit.returns(unit="turn", baseline="inclusive") if return_first else step_normalized(epsilon)
    return Objective(stage, clip=clip.ppo(clip_low, clip_high))
