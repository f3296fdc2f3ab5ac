"""Role-conditioned advantage estimation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip, filters
from tokcredit.stages.base import number
from tokcredit.stages.credit import Credit


class RoleBaselines:
    """Running mean rewards of roles, which give a batch its input ``role_baselines``.

    For each trajectory with a token that the policy chose, in the order of the batch, with ``b`` the number of its
    role, 0 at first::

        role_baselines = b
        b = decay * b + (1 - decay) * R

    Call it once for each batch, with the rows of all ranks. Keep it as long as training lasts, and save its
    :meth:`state_dict` in checkpoints.

    Args:
        decay: From 0 to 1.

    Example:
        >>> batch = baselines(batch)  # which has role_ids
        >>> prepared = tokcredit.methods.rae().prepare(batch)
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number from 0 to 1, got {decay}")
        self.decay = decay
        self._of: dict[int, float] = {}

    def __call__(self, batch: Rollouts) -> Rollouts:
        """Return the batch with ``role_baselines``, and move the running means.

        Args:
            batch: The rollouts, with ``role_ids``.
        """
        whole, before = batch.whole, []
        table = zip(whole.input("role_ids").tolist(), whole.rewards.tolist(), whole.nonempty.tolist(), strict=True)
        for role, reward, counts in table:
            b = self._of.get(role, 0.0)
            before.append(b)
            if counts:
                self._of[role] = self.decay * b + (1 - self.decay) * reward
        found = torch.tensor(before, dtype=torch.float64, device=batch.device)
        trajectories = batch.trajectories
        return batch.with_inputs(role_baselines=found if trajectories is None else trajectories.divided.of_rows(found))

    def state_dict(self) -> dict[int, float]:
        """Return the running mean of each role, for a checkpoint."""
        return dict(self._of)

    def load_state_dict(self, state: Mapping[int, float] | Mapping[str, float]) -> None:
        """Take the running means of a checkpoint.

        Args:
            state: From :meth:`state_dict`, also after JSON, which makes texts of the roles.
        """
        self._of = {int(role): float(mean) for role, mean in state.items()}


@dataclass(frozen=True)
class above_role(Credit):
    """The total reward minus the baseline of the role, ``role_baselines``.

    Args:
        discount: Factor for each turn that follows, from 0 to 1.
    """

    discount: float = number(1.0, at_least=0, at_most=1)
    reads: ClassVar[frozenset[str]] = frozenset({"role_baselines"})

    def __call__(self, batch: Rollouts) -> Tensor:
        above = batch.rewards.double() - batch.input("role_baselines")
        if self.discount == 1:
            return above.to(batch.rewards.dtype)[:, None]
        turns = batch.turns
        follow = turns.counts.index_select(0, turns.row) - 1 - turns.number
        of_turns = above.index_select(0, turns.row) * self.discount ** follow.double()
        return ops.spread(of_turns, turns.spans).to(batch.rewards.dtype)


def rae(discount: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """RAE of SPIRAL: rewards minus the running mean of the player's role, for games of a policy against itself.

    In a game in which one side wins what the other loses, the mean of a group is about 0 whatever the policy does. With
    ``b`` the running mean of the role before this trajectory, the input ``role_baselines``::

        A = (R - b) * discount ** (turns that follow)

    Trajectories whose advantage is exactly 0 are left out. :class:`RoleBaselines` keeps the running means.

    Args:
        discount: Factor for each turn that follows, from 0 to 1.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: No groups: one trajectory of each player in each game.
    References: arXiv 2506.24119.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - The loss is the mean over trajectories of the mean over tokens; a game in several rows counts once.
        - Running means are kept for each role of the batch; give roles of different games different ids.
    """
    return Objective(above_role(discount), filters=(filters.nonzero_advantage(),), clip=clip.ppo(clip_low, clip_high))
