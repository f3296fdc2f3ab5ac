"""Information-gain policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.group import standard_scores
from tokcredit.stages.credit.returns import Steps


@dataclass(frozen=True)
class information_gain(Credit):
    """The sum, from a turn on, of normalized gains in the probability of the true answer and of the outcome.

    With ``p`` the exp of ``answer_log_probs`` after a turn, before the first turn of ``initial_answer_log_probs``::

        r[k] = p[k] - (last p before it)      before the last turn;   r[K - 1] = R
        z[k] = (r[k] - mean(r)) / std(r)      gains and outcomes apart, or jointly
        A[k] = z[k] + discount * A[k + 1]

    Statistics are those of the population, over the turns of the group that have a gain, and over its outcomes. A turn
    without ``answer_log_probs`` has no gain. Numbers with a standard deviation of at most 1e-9 count as equal and give
    0. With ``return_first`` raw rewards are summed to ``G[k] = r[k] + discount * G[k + 1]``, and
    ``A[k] = G[k] - mean(G[k])`` over the trajectories of the group that have a turn k.

    Args:
        log_gain: Whether a gain is a difference of log-probs.
        jointly: Whether gains and outcomes are normalized together.
        discount: gamma, from 0 to 1.
        return_first: Whether rewards are summed before the mean is subtracted.
    """

    log_gain: bool = flag(False)
    jointly: bool = flag(False)
    discount: float = number(1.0, at_least=0, at_most=1)
    return_first: bool = flag(False)
    reads: ClassVar[frozenset[str]] = frozenset({"answer_log_probs", "initial_answer_log_probs"})

    def __call__(self, batch: Rollouts) -> Tensor:
        turns, row = batch.turns, batch.turns.row
        after = batch.input("answer_log_probs").index_select(0, turns.last).double()
        first = batch.input("initial_answer_log_probs").double()
        if not self.log_gain:
            after, first = after.exp(), first.exp()
        known = turns.of_row(~after.isnan())
        before = ops.scan(after, known, decay=0.0, carry=first, exclusive=True)[0]
        final = turns.number == turns.counts.index_select(0, row) - 1
        gains = ~after.isnan() & ~final
        rewards = torch.where(gains, after - before, torch.where(final, batch.rewards.double().index_select(0, row), 0))
        if not self.return_first:
            kind = torch.where(gains | final, batch.group_index.index_select(0, row), -1)
            if not self.jointly:
                kind = torch.where(kind >= 0, 2 * kind + final.long(), -1)
            rewards = standard_scores(rewards, segment.Ids(kind, 2 * batch.num_groups))
        to_go = ops.scan(rewards, turns.of_row(), decay=self.discount, reverse=True)[0]
        if self.return_first:
            by = Steps(turns.of_row(), turns).peers(batch)
            to_go = to_go - segment.mean(to_go, by).index_select(0, by.ids)
        return ops.spread(to_go, turns.spans).to(batch.rewards.dtype)


def igpo(
    log_gain: bool = False,
    jointly: bool = False,
    discount: float = 1.0,
    return_first: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Objective:
    """IGPO: a turn's reward is the rise of the true answer's probability; that of the last turn is the outcome.

    With ``p[k]`` the exp of the mean log-prob of the true answer after turn k, and ``R`` the total reward::

        r[k] = p[k] - p[k - 1]                before the last turn;   r[K - 1] = R
        z[k] = (r[k] - mean(r)) / std(r)      over the group, gains and outcomes apart
        A[k] = z[k] + discount * A[k + 1]

    Each term has its mean subtracted before the sum, so the advantage depends on how many turns follow.

    Args:
        log_gain: Whether a gain is a difference of log-probs.
        jointly: Whether gains and outcomes are normalized together, as by default in the released code.
        discount: gamma, from 0 to 1.
        return_first: Whether rewards are summed first and centred then over the turns with the same number, which does
            not depend on how many turns follow. There is no division then.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: GRPO plus a forward pass over the true answer after every turn.
    References: arXiv 2510.14967.
    Differences from the paper:
        - There is no KL term; the release's is ``tokcredit.mix("igpo", terms="kl(0.001)")``.
    Differences from the released code:
        - The first release subtracts the mean over a column of padded tokens, and its returns end at tool replies.
        - A gain of exactly 0 counts; the release leaves it out.
        - There is no curriculum of weights, and no reward of -2 for a wrong format.
    """
    return Objective(information_gain(log_gain, jointly, discount, return_first), clip=clip.ppo(clip_low, clip_high))
