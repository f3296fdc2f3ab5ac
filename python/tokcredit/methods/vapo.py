"""Value-augmented PPO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, credit, term
from tokcredit.stages.base import number, part
from tokcredit.stages.filters import Filter


@dataclass(frozen=True)
class rewarded(Filter):
    """The trajectories whose total reward exceeds a number.

    Args:
        above: The number.
    """

    above: float = number(0.0)

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        return (batch.rewards > self.above)[:, None]


@dataclass(frozen=True)
class imitation(term.nll):
    """Negative log-likelihood of the rewarded trajectories, the mean over their tokens.

    The stage is :class:`tokcredit.stages.term.nll` with its own defaults.

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
        where: Filter of the rows that it acts on.
        aggregation: How tokens are averaged.
    """

    where: Filter | None = part(Filter, rewarded, optional=True)
    aggregation: aggregation.Aggregation | None = part(aggregation.Aggregation, aggregation.token_mean, optional=True)


def vapo(
    alpha: float = 0.05,
    nll: float = 0.1,
    above: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Objective:
    """VAPO: PPO whose lambda grows with the length of the response, plus imitation of the correct responses.

    With L the tokens of a trajectory and ``delta[t] = r[t] + V[t + 1] - V[t]``::

        A[t] = delta[t] + (1 - 1 / (alpha * L)) * A[t + 1]
        loss = clipped loss of whiten(A) + nll * mean of -log p over the tokens of rewarded trajectories

    The value targets have a lambda of 1.

    Args:
        alpha: lambda is ``1 - 1 / (alpha * L)``, and 0 where ``alpha * L`` is at most 1; above 0.
        nll: Factor of the imitation, the paper's mu; at least 0.
        above: A trajectory is imitated if its total reward exceeds this.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as PPO, and training of the critic alone before.
    References: arXiv 2504.05118.
    Differences from the paper:
        - The critic is not trained before the policy here; ``tokcredit train --critic-warmup`` does it.
    Differences from the released code:
        - NeMo-RL divides the imitation by the tokens of the micro-batch, so that micro-batches do not add up to the
          batch; here the tokens of the batch are counted.
    """
    return Objective(
        credit.whitened(credit.gae(adaptive=alpha)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        terms=(imitation(nll, rewarded(above)),),
    )
