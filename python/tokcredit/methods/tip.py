"""Token importance in on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, filters, token_score
from tokcredit.stages.base import number, part
from tokcredit.stages.filters import Filter, highest
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
        return highest(x.double().log() + noise, self.share, spans, round_up=False)


def tip(share: float = 0.5, quantile: float = 0.98, rank: TokenScore | None = None, drawn: bool = False) -> Supervised:
    """TIP: on-policy distillation of the tokens where the student is uncertain, or certain and far from its teacher.

    ``h`` is the entropy of the student, lowered to its 98 % quantile over the batch, and ``d`` the divergence
    ``KL(student || teacher)``, both scaled to ``[0, 1]`` in each response. The share of each response with the largest
    score is kept::

        score = 1 - (1 - h) * (1 - d)
        loss = mean over the kept tokens of KL(student || teacher)

    ``loss`` is given the divergences with their gradient (``tokcredit.divergence.between``) instead of log-probs.
    Rewards are not read.

    Args:
        share: Share of the tokens of each response that are kept, above 0 and at most 1; rounded down to at least one
            token. The paper's rho.
        quantile: Quantile of the entropies of the batch to which larger ones are lowered, from 0 to 1.
        rank: Another score. ``token_score.given("entropies")`` is the paper's entropy-only selection, and its Q3-only
            selection is ``token_score.but_not(token_score.given("forward_kl"),
            token_score.scaled(token_score.given("entropies"), 0.98))``.
        drawn: Whether tokens are drawn in proportion to the score instead of taking the largest, as the paper does for
            its entropy-only selection.

    Cost: No groups and no rewards; a forward pass of the teacher, and a backward pass of the student over the kept
        tokens.
    References: arXiv 2604.14084.
    Differences from the paper:
        - The paper leaves the scope of the ranking open. Here tokens are ranked in each response.
        - The paper leaves the mean open. Here it is over all kept tokens of the batch.
        - Scores of a response that are all equal are scaled to 0.
    Differences from the released code:
        - The released code does not have this score. It draws tokens in proportion to powers of entropy and
          Jensen-Shannon divergence.
    """
    if rank is None:
        entropies = token_score.scaled(token_score.given("entropies"), quantile)
        rank = token_score.either(entropies, token_score.scaled(token_score.given("reverse_kl")))
    kept = drawn_share(share, rank) if drawn else filters.top_share(share, rank, per_row=True, round_up=False)
    return Supervised(reverse_kl(), filters=(kept,), aggregation=aggregation.token_mean())
