"""Direct Preference Optimization with token-level reward guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts
from tokcredit.settings import Range
from tokcredit.stages.base import number, part
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.link import logistic
from tokcredit.stages.token_score import TokenScore, log_ratio
from tokcredit.stages.token_weights import TokenWeight


@dataclass(frozen=True)
class guided(TokenWeight):
    """``1 + alpha * reward`` in chosen rows and ``1 - alpha * reward`` in rejected ones.

    Args:
        reward: Reward of each token.
        alpha: Strength of the guidance, at least 0.
        minimum: Smallest weight, or None for no limit.
    """

    reward: TokenScore = part(TokenScore)
    alpha: float = number(0.5, at_least=0)
    minimum: float | None = number(None, optional=True)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        reward = self.reward(batch)
        weights = 1 + self.alpha * per_token(advantages.sign(), batch.spans) * reward
        return weights if self.minimum is None else weights.clamp(min=self.minimum)


def tgdpo(
    beta: float = 0.1,
    alpha: float = 0.5,
    reward_beta: Annotated[float | None, Range("number", above=0, optional=True)] = None,
    f_min: float | None = None,
) -> Preference:
    """TGDPO: DPO whose tokens are weighted by the rewards that an aligned policy gives them.

    The aligned policy, for example one trained by DPO or SimPO, has the log-probs ``aligned_log_probs``::

        r[t] = reward_beta * (log p_aligned - log p_ref)
        f[t] = 1 + alpha * r[t] in the chosen response, 1 - alpha * r[t] in the rejected one
        S = sum over the tokens of a response of f[t] * (log p - log p_ref)
        loss = mean over pairs of -log sigmoid(beta * (S[chosen] - S[rejected]))

    Args:
        beta: Strength of the preference, above 0.
        alpha: Strength of the guidance, at least 0. With 0 it is DPO.
        reward_beta: Factor of the token rewards, above 0; ``beta`` if None.
        f_min: Smallest weight of a token, or None for no limit, as in the released code.

    Cost: DPO, and log-probs of the aligned policy.
    References: arXiv 2506.14574.
    Differences from the paper:
        - The paper leaves the form of f open and uses the one above.
        - ``reward_beta`` and ``f_min`` are additions. The theory assumes positive weights; without a positive ``f_min``
          a token whose log-probs differ by more than 20 nats has a negative one with the default settings.
    Differences from the released code:
        - Its optional negative log-likelihood of chosen responses cannot run there. Here it is
          ``tc.mix("tgdpo", pair_terms="chosen_nll()")``.
    """
    reward = log_ratio("aligned_log_probs", scale=beta if reward_beta is None else reward_beta)
    return Preference((guided(reward, alpha, f_min),), link=logistic(beta))
