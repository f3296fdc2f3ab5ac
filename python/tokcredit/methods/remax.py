"""ReMax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokcredit import ops
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, credit
from tokcredit.stages.base import part
from tokcredit.stages.credit import Credit


@dataclass(frozen=True)
class above_greedy(Credit):
    """Another credit minus the reward of a greedy response, ``greedy_rewards``.

    Args:
        of: The other credit.
    """

    of: Credit = part(Credit, credit.returns)
    reads: ClassVar[frozenset[str]] = frozenset({"greedy_rewards"})

    def __call__(self, batch: Rollouts) -> Tensor:
        given, baseline = self.of(batch), batch.input("greedy_rewards")
        if given.dim() == 2:
            return given - baseline.to(given.dtype)[:, None]
        return given - ops.spread(baseline.to(given.dtype), batch.spans)


def remax(discount: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """ReMax: returns minus the reward of a greedy response to the same prompt, without groups and without critic.

    With ``r`` the ``token_rewards``, the outcome added at the last token of the trajectory::

        G[t] = r[t] + discount * G[t + 1]
        A[t] = G[t] - greedy_rewards

    Args:
        discount: gamma, from 0 to 1.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: One greedy response for every prompt.
    References: arXiv 2310.10505.
    Differences from the paper:
        - The paper updates on policy, where the clip ranges have no effect.
        - There is no KL penalty.
    Differences from the released code:
        - None known.
    """
    return Objective(
        above_greedy(credit.returns(discount)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
