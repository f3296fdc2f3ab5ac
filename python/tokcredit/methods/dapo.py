"""Decoupled clip and dynamic sampling policy optimization."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit


def dapo(clip_low: float = 0.2, clip_high: float = 0.28, cap: float | None = None) -> Objective:
    """DAPO: GRPO with a higher upper clip range and the mean over all tokens of the batch.

    With ``A`` the advantage of GRPO and ``q`` the token's ratio::

        loss = mean over all tokens of max(-A * q, -A * clip(q, 1 - clip_low, 1 + clip_high))

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        cap: Dual-clip constant, at least 1: where ``A < 0`` the loss is at most ``-A * cap``. None for no dual clip.

    Cost: The same as GRPO.
    References: Yu et al., arXiv 2503.14476.
    Differences from the paper:
        - Dynamic sampling and the soft penalty for overlong responses are not part of the objective: they belong to
          the sampler and to the reward.
        - The mean is over the tokens of the whole batch; the paper writes it for each group.
    Differences from the released code:
        - There is no dual clip unless ``cap`` is given; verl always has one of 3.0.
    """
    return Objective(
        credit.group_normalized(),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.token_mean(),
    )
