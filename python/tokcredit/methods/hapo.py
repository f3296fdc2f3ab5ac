"""Heterogeneous adaptive policy optimization."""

from __future__ import annotations

from tokcredit import aggregation, clip, credit, gain, score
from tokcredit.objective import Objective


def hapo(
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    cap: float | None = 10.0,
    pivot: float = 0.8,
    widen: float = 1.0,
    strength: float = 1.0,
    epsilon: float = 1e-6,
    literal_sign: bool = False,
) -> Objective:
    """DAPO that treats each token by its entropy: rewards normalised over tokens, pay and window adapted to it.

    h in ``[-1, 1]`` is how far the token's log-entropy is from the batch's 80 % quantile. The lower bound of the ratio
    widens where h < 0 and the upper where h > 0; the advantage is multiplied by ``1 + h`` where an uncertain token has
    left the middle of its window, or a certain one has not. ``tokcredit.temperature.AdaptiveTemperature`` samples by
    the same h.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``, before widening.
        clip_high: the ratio may rise to ``1 + clip_high``, before widening.
        cap: where A < 0 the loss is at most ``-A cap``.
        pivot: the quantile.
        widen: a bound grows to at most ``1 + widen`` times.
        strength: the advantage is multiplied by ``1 + strength h``.
        epsilon: added to the standard deviations.
        literal_sign: h is never negative, as the released code computes it: no rule for certain tokens applies.

    Cost: as GRPO, plus entropies with the old log-probs.
    Source: arXiv 2509.16591.
    Departs from the released code: the sign of h; its statistics are those of the batch under the old policy, not of
    the micro-batch under the current one; upper bound 0.28 as in the paper (scripts: 0.2), cap as in the scripts.
    Adaptive sampling is the sampler's, and off unless asked for.
    """
    h = score.entropy_deviation(pivot, literal_sign)
    return Objective(
        credit.token_normalized(epsilon=epsilon, otherwise=credit.group_normalized(epsilon=epsilon)),
        clip=clip.widened(h, clip_low, clip_high, widen, cap),
        aggregation=aggregation.token_mean(),
        gain=gain.outside_center(h, strength),
    )
