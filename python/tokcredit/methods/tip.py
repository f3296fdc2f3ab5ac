"""Token importance in on-policy distillation."""

from __future__ import annotations

from tokcredit import aggregation, clip, credit, ratio, score, weights
from tokcredit.objective import Objective


def tip(share: float = 0.5, quantile: float = 0.98, rank: score.Score | None = None, drawn: bool = False) -> Objective:
    """On-policy distillation of the tokens where the student is uncertain, or certain and far from its teacher.

    The loss is the mean over the kept tokens of ``KL(student || teacher)``, and is given those divergences (with their
    gradient, ``tokcredit.divergence.kl``) in place of log-probs. Kept is the share of each row with the largest
    ``h + d - h d``: h the entropy and d the divergence, each scaled to ``[0, 1]`` in the row, h after lowering the
    largest of the batch to its quantile. Rewards are not read.

    Args:
        share: of each row's tokens, at least one.
        quantile: of the batch's entropies.
        rank: another score. The paper's entropy-only selection is ``score.given("entropies")``, its Q3-only
            ``score.but_not(score.given("forward_kl"), score.scaled(score.given("entropies"), 0.98))``.
        drawn: draw tokens in proportion to the score, as the paper does for entropy-only, in place of the largest.

    Cost: no groups and no rewards; a teacher's forward pass, and the student's backward pass on the share only.
    Source: arXiv 2604.14084.
    Departs from the paper: nothing where it is explicit; it leaves the scope open and this ranks inside each row, clips
    over the batch, and takes the mean over all kept tokens. Our trainer divides the logits of both by the sampling
    temperature, 1 by default.
    """
    if rank is None:
        entropies = score.scaled(score.given("entropies"), quantile)
        rank = score.either(entropies, score.scaled(score.given("reverse_kl")))
    kept = weights.drawn_share(share, rank) if drawn else weights.top_share(share, rank, per_row=True, round_up=False)
    return Objective(
        credit.constant(-1.0),
        weights=(kept,),
        ratio=ratio.one(),
        clip=clip.weighted(),
        aggregation=aggregation.token_mean(),
        variable="reverse_kl",
    )
