"""Segment policy optimization, chain."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit, filters, ratio
from tokcredit.stages.credit import Credit


def spo_chain(below: float = 0.9, clip_low: float = 0.2, clip_high: float = 0.2, whiten: bool = False) -> Objective:
    """SPO-chain: PPO without a critic; the advantage of a segment is the change of a Monte-Carlo value over it.

    Segments begin at improbable tokens, those of :func:`tokcredit.credit.improbable_cuts`. The value ``V`` of a state
    is the mean reward of continuations sampled from it, and at the end of the response its own reward. For the tokens
    of segment ``k``, which begins at state ``s[k]``::

        A = V(s[k + 1]) - V(s[k])

    Tokens before the first segment have ``A = 0``. Only tokens to which the old policy gave a probability of less than
    ``below`` train.

    Args:
        below: Tokens with a smaller probability under the old policy train, from 0 to 1; the paper's rho.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        whiten: Whether advantages are shifted and scaled to mean 0 and variance 1 over the tokens that train, as in the
            released code.

    Cost: No groups, but several continuations (nine in the release) from every cut of every response.
    References: arXiv 2505.23564.
    Differences from the paper:
        - There is no KL term. The release adds 1e-4 times the mean over rows of the sum of k3 over tokens that train:
          ``tokcredit.mix("spo_chain", terms="kl(1e-4, limit=10000, aggregation=sequence_sum(1))")``.
        - A continuation that is cut at the length limit has the reward of its text.
    Differences from the released code:
        - Advantages are not whitened unless ``whiten`` is set.
        - The release skips a micro-batch whose mean ratio exceeds 10.
    """
    changes: Credit = credit.value_changes()
    return Objective(
        credit.whitened(changes, below) if whiten else changes,
        filters=(filters.improbable(below),),
        ratio=ratio.token(bound=10.0),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
