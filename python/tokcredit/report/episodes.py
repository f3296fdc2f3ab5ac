"""The turns of episodes: where they lie, their rewards, and the states that several of them began in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokcredit.blocks import segment
from tokcredit.rollouts import Rollouts


def turns(batch: Rollouts, answers: Sequence[Sequence[str]] | None) -> dict[str, Any] | None:
    """Return one line per turn, or None for rollouts of one turn without rewards of turns and without states.

    Args:
        batch: Rollouts in which each row is a trajectory.
        answers: For each row the texts that answered its turns, or None.

    Returns:
        ``rollout``; ``begin`` and ``end``: its first token and one past its last in the rollout, both chosen by the
        policy; ``reward``: the sum of ``turn_rewards``, or else of ``token_rewards``, NaN without both; ``state``: a
        number from 0 for each ``anchor_ids`` that several turns of the group have, -1 for others; ``answer``: a list of
        texts, empty where there is none or where a row does not have one per turn.
    """
    found = batch.turns
    rewards = next((batch.input(name) for name in ("turn_rewards", "token_rewards") if batch.has_input(name)), None)
    anchored = batch.has_input("anchor_ids")
    if rewards is None and not anchored and bool((found.counts < 2).all()):
        return None
    reward = torch.full(found.first.shape, torch.nan) if rewards is None else segment.sum(rewards, found.spans)
    begin, counts = batch.begin[found.row], found.counts.tolist()
    texts = [
        text
        for count, own in zip(counts, answers or [()] * len(counts), strict=True)
        for text in (own if len(own) == count else [""] * count)
    ]
    state = np.full(len(found.row), -1)
    if anchored:
        anchor, group = batch.input("anchor_ids")[found.first].numpy(), batch.group_index[found.row].numpy()
        for g in np.unique(group):
            own = np.flatnonzero(group == g)
            _, number, count = np.unique(anchor[own], return_inverse=True, return_counts=True)
            shared = count > 1
            state[own] = np.where(shared[number], (shared.cumsum() - 1)[number], -1)
    return {
        "rollout": found.row.numpy(),
        "begin": (found.first - begin).numpy(),
        "end": (found.last + 1 - begin).numpy(),
        "reward": reward.numpy(),
        "state": state,
        "answer": texts,
    }
