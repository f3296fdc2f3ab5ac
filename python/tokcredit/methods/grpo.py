"""Group Relative Policy Optimization."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit, ratio


def grpo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cap: float | None = None,
    scale: bool = True,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO: one advantage per response, its reward normalized in the group, with PPO's clip.

    For token ``t`` of response ``i``, with the sample standard deviation and ``q`` the token's ratio::

        A[i] = (r[i] - mean(r)) / (std(r) + epsilon)
        loss = mean over i of mean over t of max(-A[i] * q, -A[i] * clip(q, 1 - clip_low, 1 + clip_high))

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        cap: Dual-clip constant, at least 1: where ``A < 0`` the loss is at most ``-A * cap``. None for no dual clip.
            verl uses 3.0, TRL none.
        scale: Whether to divide by the standard deviation.
        epsilon: Added to the standard deviation. verl uses 1e-6, TRL 1e-4.

    Cost: One forward pass for the old log-probs, and one forward and one backward pass.
    References: Shao et al., arXiv 2402.03300.
    Differences from the paper:
        - There is no KL term. The paper's is ``tokcredit.mix("grpo", terms="kl(0.04)")``.
        - A group of one has mean 0 and standard deviation 1, as in verl.
    Differences from the released code:
        - Rows without a token that the policy chose are left out of group statistics. TRL and verl count them, as does
          ``tokcredit.mix("grpo", credit="group_normalized(count_empty=True)")``.
        - verl clamps k3 at 10, as does ``tokcredit.mix("grpo", terms="kl(0.001, limit=10)")``; TRL and the default here
          do not.
        - The log-ratio is clamped to ``[-20, 20]``, as in verl; TRL does not clamp it.
    """
    return Objective(
        credit.group_normalized(scale, epsilon),
        ratio=ratio.token(),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.sequence_mean(),
    )
