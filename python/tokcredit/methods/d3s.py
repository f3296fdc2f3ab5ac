"""Dynamic dual-level down-sampling."""

from __future__ import annotations

from tokcredit import aggregation, clip, credit, score, weights
from tokcredit.objective import Objective
from tokcredit.schedule import linear


def d3s(
    rows_start: float = 0.25,
    rows_end: float = 1.0,
    tokens_start: float = 0.2,
    tokens_end: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO on the rows whose advantages vary most, and there on the tokens with the largest ``|A| H``.

    Rows are chosen from the whole batch so that the variance of their advantages, normalised in their groups before, is
    largest; rows paid nothing are dropped. H is the entropy of the next-token distribution under the old policy. Both
    shares grow linearly over training.

    Args:
        rows_start: share of the batch's rows that are kept at the first step.
        rows_end: share at the last step.
        tokens_start: share of the kept rows' tokens that train at the first step.
        tokens_end: share at the last step.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: entropies with the old log-probs; then passes on the kept rows only.
    Source: arXiv 2509.22115.
    Departs from the paper: the shares it used, the scope of the token ranking and the denominator were not found; this
    ranks all kept rows together, rounds the number of tokens up and takes the mean over the tokens that train.
    """
    return Objective(
        credit.group_normalized(epsilon=epsilon),
        weights=(
            weights.varied_rows(linear(rows_start, rows_end)),
            weights.with_credit(),
            weights.top_share(linear(tokens_start, tokens_end), score.given("entropies"), paid=True),
        ),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
