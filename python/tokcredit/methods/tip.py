"""Token importance in on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit.blocks import select
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, filters, token_score
from tokcredit.stages.base import number, part
from tokcredit.stages.filters import Filter
from tokcredit.stages.token_score import TokenScore
from tokcredit.supervised import Supervised, reverse_kl


@dataclass(frozen=True)
class drawn_share(Filter):
    """A share of each row's tokens, drawn without replacement in proportion to a score; at least one token.

    The number of tokens is rounded down. Tokens are drawn anew at every call, from torch's default generator.

    Args:
        share: Share of the tokens, above 0 and at most 1; may be a schedule.
        score: Score of each token, at least 0.
    """

    share: float = number(above=0, at_most=1, scheduled=True)
    score: TokenScore = part(TokenScore)

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        x, spans = self.score(batch), batch.spans
        # The k largest of log x plus Gumbel noise are k draws without replacement in proportion to x.
        noise = -torch.empty_like(x, dtype=torch.float64).exponential_().log()
        wanted = (select.sizes(spans).double() * self.share + 1e-9).floor()
        return select.top_k(x.double().log() + noise, wanted.long().clamp(min=1), spans)


def tip(share: float = 0.5, quantile: float = 0.98, rank: TokenScore | None = None, drawn: bool = False) -> Supervised:
    """On-policy distillation of the tokens where the student is uncertain, or certain and far from its teacher.

    The loss is the mean over the kept tokens of ``KL(student || teacher)``, and is given those divergences (with their
    gradient, ``tokcredit.divergence.kl``) in place of log-probs. Kept is the share of each row with the largest
    ``h + d - h d``: h the entropy and d the divergence, each scaled to ``[0, 1]`` in the row, h after lowering the
    largest of the batch to its quantile. Rewards are not read.

    Args:
        share: of each row's tokens, at least one.
        quantile: of the batch's entropies.
        rank: another score. The paper's entropy-only selection is ``token_score.given("entropies")``, its Q3-only
            ``token_score.but_not(token_score.given("forward_kl"), token_score.scaled(token_score.given("entropies"), 0.98))``.
        drawn: draw tokens in proportion to the score, as the paper does for entropy-only, in place of the largest.

    Cost: no groups and no rewards; a teacher's forward pass, and the student's backward pass on the share only.
    Source: arXiv 2604.14084.
    Departs from the paper: nothing where it is explicit; it leaves the scope open and this ranks inside each row, clips
    over the batch, and takes the mean over all kept tokens. Our trainer divides the logits of both by the sampling
    temperature, 1 by default.
    """
    if rank is None:
        entropies = token_score.scaled(token_score.given("entropies"), quantile)
        rank = token_score.either(entropies, token_score.scaled(token_score.given("reverse_kl")))
    kept = drawn_share(share, rank) if drawn else filters.top_share(share, rank, per_row=True, round_up=False)
    return Supervised(reverse_kl(), filters=(kept,), aggregation=aggregation.token_mean())
