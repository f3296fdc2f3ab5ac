"""Simple Preference Optimization."""

from __future__ import annotations

from typing import Annotated

from tokcredit.preference import Preference
from tokcredit.settings import Range
from tokcredit.stages.link import logistic
from tokcredit.stages.token_weights import TokenWeight


def simpo(
    beta: Annotated[float, Range("number", above=0)] = 2.0,
    gamma_beta_ratio: Annotated[float, Range("number", at_least=0)] = 0.25,
    label_smoothing: float = 0.0,
    token_weights: tuple[TokenWeight, ...] = (),
) -> Preference:
    """SimPO: the mean log-prob of the chosen response is raised above that of the rejected one by a margin.

    There is no reference policy. With ``w`` the token weights, 1 by default, and ``e`` the label smoothing::

        A = mean over the tokens of a response of w * log p
        z = beta * (A[chosen] - A[rejected] - gamma_beta_ratio)
        loss = mean over pairs of -(1 - e) * log sigmoid(z) - e * log sigmoid(-z)

    Args:
        beta: Scale of the difference, above 0. The authors use 2 to 10.
        gamma_beta_ratio: Wanted difference of the means, at least 0: the paper's gamma divided by beta.
        label_smoothing: Assumed share of wrong labels, at least 0 and below 0.5.
        token_weights: Factors of the tokens in ``A``.

    Cost: Two rows per pair.
    References: Meng et al., arXiv 2405.14734.
    Differences from the paper:
        - Token weights and label smoothing are additions; the released code has the latter.
        - A response without tokens has ``A = 0``.
    Differences from the released code:
        - None known. TRL's ``simpo_gamma`` is ``beta * gamma_beta_ratio``, with other defaults.
    """
    link = logistic(beta, beta * gamma_beta_ratio, label_smoothing)
    return Preference(token_weights, None, "mean", link)
