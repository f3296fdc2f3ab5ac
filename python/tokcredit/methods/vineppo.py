"""VinePPO."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit
from tokcredit.stages.credit import Credit


def vineppo(clip_low: float = 0.2, clip_high: float = 0.2, whiten: bool = False) -> Objective:
    """VinePPO: PPO without a critic; the advantage of a reasoning step is the change of a Monte-Carlo value over it.

    The value ``V`` of a state is the mean reward of continuations sampled from it, and at the end of the response its
    own reward. For the tokens of step ``k``, which begins at state ``s[k]``::

        A = V(s[k + 1]) - V(s[k])

    The input ``step_values`` holds the values at the first token of every step, so the sampler decides where steps
    begin.

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        whiten: Whether advantages are shifted and scaled to mean 0 and variance 1 over the tokens of the batch, as in
            the released configuration.

    Cost: No groups, but nine continuations from the beginning of every step of every response.
    References: Kazemnejad et al., arXiv 2410.01679.
    Differences from the paper:
        - There is no KL term. The release adds 1e-4 times the mean over rows of the *sum* over tokens of k3, at most 10
          per token: ``tokcredit.mix("vineppo", terms="kl(1e-4, limit=10, aggregation=sequence_sum(1))")``. With the
          mean over tokens the weight would have to be larger by the mean length of the rows.
        - A continuation that is cut at the length limit has the reward of its text.
    Differences from the released code:
        - Advantages are not whitened unless ``whiten`` is set.
        - The release skips a micro-batch whose mean ratio exceeds 10. Here the log-ratio is clamped to ``[-20, 20]``.
    """
    changes: Credit = credit.value_changes("step_values")
    return Objective(
        credit.whitened(changes) if whiten else changes,
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
