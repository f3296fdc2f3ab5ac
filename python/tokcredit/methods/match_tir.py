"""MatchTIR: tool-integrated reasoning by matching calls."""

from __future__ import annotations

from tokcredit import clip, credit
from tokcredit.objective import Objective


def match_tir(
    discount: float = 0.9,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
    halve: bool = False,
    centre_alone: bool = False,
) -> Objective:
    """GRPO for tool use, where each turn is also paid by how well its calls match the calls that were expected.

    A turn's reward is the mean match of its calls (``tokcredit.matching``). ``A`` is the sum of the row's rewards,
    normalised in the group, plus the discounted sum from the turn on, normalised among the rows that have that turn.
    The batch's ``rewards`` are not read.

    Args:
        discount: of a later turn's reward.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviations.
        halve: divide the advantage by 2, as the released code does.
        centre_alone: a turn that only one row of the group has is paid 0, in place of its undivided return.

    Cost: as GRPO; matching is a small assignment problem per row, on the CPU.
    Source: arXiv 2601.10712.
    Departs from the paper: no KL and no entropy term (theirs: 0.001 each). The release matches greedily where it says
    Hungarian: ``matching.greedy`` in place of ``matching.optimal``.
    """
    return Objective(credit.turns(discount, epsilon, halve, centre_alone), clip=clip.ppo(clip_low, clip_high))
