"""Length value model."""

from __future__ import annotations

from tokcredit import clip, credit
from tokcredit.objective import Objective


def lenvm(
    scale: float = 0.1,
    gamma: float = 0.997,
    trace: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO plus, per token, how much shorter than predicted it made the row.

    A head predicts ``-(1 - gamma^l)``, l being the tokens still to come; the added term is the generalized advantage of
    a cost of ``1 - gamma`` per token against that prediction. ``tokcredit.length`` has targets, losses, the way back
    to tokens, and decoding.

    Args:
        scale: of the added term; above 0 shortens, below 0 lengthens.
        gamma: that of the head; ``tokcredit.length.gamma_for`` the 99th percentile of lengths.
        trace: lambda of the advantage; 1 compares with the actual length.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: as GRPO, plus a value head on the old policy's hidden states and a scan along the rows.
    Source: arXiv 2604.27039.
    Departs from the paper: which describes this use without an experiment; scale and trace are ours, and so is that a
    row cut at the length limit goes on as predicted before its last token: cutting it did not make it short.
    """
    return Objective(
        credit.shortening(credit.group_normalized(epsilon=epsilon), scale, gamma, trace),
        clip=clip.ppo(clip_low, clip_high),
    )
