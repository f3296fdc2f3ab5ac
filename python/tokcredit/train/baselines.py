"""Baselines of rewards that need no group: the reward of a greedy response, and running means of roles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tokcredit.methods.rae import RoleBaselines
from tokcredit.rollouts import Rollouts
from tokcredit.train.problems import Problem
from tokcredit.train.ranks import Ranks
from tokcredit.train.rollout_collection import RolloutCollection


def with_greedy(
    collection: RolloutCollection, attempt: Callable[[Sequence[Problem]], list[float]]
) -> RolloutCollection:
    """Return the collection with ``greedy_rewards``, 0 where the reward function failed.

    Args:
        collection: The rollouts, whole groups.
        attempt: Returns the reward of one greedy response to each problem.
    """
    groups, first = collection.batch.group_index.tolist(), dict[int, Problem]()
    for row, group in enumerate(groups):
        first.setdefault(group, collection.problems[row])
    of_groups = dict(zip(first, attempt(list(first.values())), strict=True))
    rewards = collection.batch.rewards.new_tensor([of_groups[group] for group in groups]).nan_to_num()
    return collection._replace(batch=collection.batch.with_inputs(greedy_rewards=rewards))


class Roles(RoleBaselines):
    """Running mean rewards of roles over all processes. Without ``role_ids`` in the batch a task is a role.

    Args:
        problems: All problems, which name the tasks.
        ranks: The processes.
    """

    def __init__(self, problems: Iterable[Problem], ranks: Ranks) -> None:
        super().__init__()
        self._tasks, self._ranks = sorted({problem.task for problem in problems}), ranks

    def of(self, batch: Rollouts, problems: Sequence[Problem]) -> Tensor:
        """Return the running mean of each row's role before the step, float ``[R]``, and move the running means.

        Args:
            batch: The rollouts of this process.
            problems: Problem of each row.
        """
        if not batch.has_input("role_ids"):
            numbers = torch.tensor(
                [self._tasks.index(p.task) for p in problems], dtype=torch.int64, device=batch.device
            )
            batch = batch.with_inputs(role_ids=numbers)
        everything, mine = self._ranks.gather(batch, frozenset({"role_ids"}))
        return self(everything).input("role_baselines")[mine.to(batch.device)]
