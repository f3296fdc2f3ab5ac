"""Segment policy optimization, tree."""

from __future__ import annotations

from tokcredit import aggregation, clip, credit, ratio, weights
from tokcredit.objective import Objective


def spo_tree(
    below: float = 0.9, clip_low: float = 0.2, clip_high: float = 0.2, scale: bool = False, whiten: bool = False
) -> Objective:
    """PPO without a critic on the edges of a sampled tree: each is paid the value below it minus that of its siblings.

    A row of the batch is an edge: the tokens of the path above it, masked, and its own. A leaf is worth its reward, a
    node the mean of its children; the advantage is the value of the edge's end minus that of its beginning. Edges paid
    0 leave the batch, and only tokens of a probability below 0.9 train.

    Args:
        below: tokens of a smaller probability under the old policy train.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        scale: divide by the standard deviation of the siblings' values.
        whiten: give the advantages of the tokens that train mean 0 and variance 1, as the released code does.

    Cost: one sampled tree per prompt (6 x 6 x 6 in the release), whose edges are both the data and the estimate.
    Source: arXiv 2505.23564.
    Departs from the paper: no KL term (theirs: k3, 1e-4, a sum over tokens), no replay of edges, and not the
    release's optional best-of-k term. The release also skips a micro-batch whose mean ratio exceeds 10.
    """
    change = credit.edges(scale)
    return Objective(
        credit.whitened(change, below, paid=True) if whiten else change,
        weights=(weights.with_credit(), weights.improbable(below)),
        ratio=ratio.token(bound=10.0),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
