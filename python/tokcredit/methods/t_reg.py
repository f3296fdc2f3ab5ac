"""Token-level reward regularization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts
from tokcredit.settings import Range
from tokcredit.stages.base import flag, input_name, number, part
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import Pairs, PairTerm, weighing
from tokcredit.stages.token_score import TokenScore


@dataclass(frozen=True)
class contrasted(TokenScore):
    """``sigmoid(log p_better - log p_worse) - 0.5``: how much a token belongs to a better answer, from -0.5 to 0.5.

    Args:
        better: Input with the log-probs under a prompt that asks for a better answer.
        worse: Input with the log-probs under a prompt that asks for a worse one.
    """

    better: str = input_name("better_log_probs")
    worse: str = input_name("worse_log_probs")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The two inputs that are compared."""
        return frozenset({self.better, self.worse})

    def __call__(self, batch: Rollouts) -> Tensor:
        return (batch.input(self.better) - batch.input(self.worse)).sigmoid() - 0.5


@dataclass(frozen=True)
class regularized(PairTerm):
    """Log-probs in proportion to token rewards, with the weight that the pair has in the gradient of the link.

    With token rewards ``r``, and the derivatives ``link'`` of the pair's loss to its two scores, of which the first is
    negative::

        L(response) = -sum over t of r[t] * log p[t]                  # divided by the tokens, if scores are
        term = -link'[chosen] * L(chosen) + link'[rejected] * L(rejected)

    With the logistic link both weights are ``beta * sigmoid(-z)``. If they are constant, the gradient is that of the
    link with the factors ``1 + coefficient * r`` of chosen and ``1 - coefficient * r`` of rejected tokens.

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
        reward: Reward of each token.
        constant_weight: Whether the weights have no gradient.
    """

    coefficient: float = number(0.25, at_least=0, scheduled=True)
    reward: TokenScore = part(TokenScore, contrasted)
    constant_weight: bool = flag(True)
    metric: ClassVar[str] = "regularization_mean"

    def __call__(self, pairs: Pairs) -> Tensor:
        reward = self.reward(pairs.batch)
        spans = weighing(pairs.batch.spans, reward)
        rows = -segment.weighted_sum(pairs.variables["log_probs"], spans, reward) / pairs.divisors
        chosen, rejected = (rows.index_select(0, x) for x in pairs.rows)
        of_chosen, of_rejected = pairs.slopes(self.constant_weight)
        return of_rejected * rejected - of_chosen * chosen


def t_reg(
    beta: Annotated[float, Range("number", above=0)] = 0.1,
    alpha: float = 0.25,
    gamma_beta_ratio: Annotated[float | None, Range("number", at_least=0, optional=True)] = None,
    constant_weight: bool = True,
) -> Preference:
    """T-REG: DPO with rewards of tokens that the reference policy gives itself, asked for a better and a worse answer.

    With ``S`` the log-ratio of a response::

        r[t] = sigmoid(log p_better[t] - log p_worse[t]) - 0.5
        L(response) = -sum over t of beta * r[t] * log p[t]
        z = beta * (S[chosen] - S[rejected])
        loss = mean over pairs of -log sigmoid(z) + alpha * sigmoid(-z) * (L(chosen) + L(rejected))

    With a constant weight its gradient is DPO's with the factors ``1 + alpha * r`` of chosen and ``1 - alpha * r`` of
    rejected tokens.

    Args:
        beta: Strength of the preference, above 0.
        alpha: Strength of the regularization, at least 0. With 0 it is DPO. The paper uses 0.1, 0.25 and 0.5.
        gamma_beta_ratio: None for DPO. A number for SimPO with this margin: means of log-probs, no reference policy.
        constant_weight: Whether the factor ``sigmoid(-z)`` of the regularization has no gradient.

    Cost: DPO, and log-probs of the reference policy under two more prompts.
    References: arXiv 2412.02685.
    Differences from the paper:
        - Whether the factor has a gradient is not verified; it has none, which matches the factors above.
        - The form for SimPO is not verified: L is divided by the length, like the score.
        - The prompts that ask for better and worse answers are not verified. The trainer's put a request after the
          question, and may quote the response (``--better-template``, ``--worse-template``).
    Differences from the released code:
        - It was not available.
    """
    term = regularized(alpha, contrasted(), constant_weight)
    if gamma_beta_ratio is None:
        return Preference(link=logistic(beta), pair_terms=(term,))
    link = logistic(beta, beta * gamma_beta_ratio)
    return Preference(reference=None, normalization="mean", link=link, pair_terms=(term,))
