"""Tinker: training data as the cookbook assembles it, with the advantages of an objective for each token.

``assemble_training_data`` takes the place of the cookbook's ``compute_advantages`` and ``assemble_training_data``. The
reward of a transition is one of a turn; ``final_rewards_G`` are outcomes. The loss is Tinker's. Tested with
tinker-cookbook 0.6.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tinker
import torch
from tinker_cookbook.rl import data_processing
from tinker_cookbook.rl.types import PARSE_ERROR_MASKED_METRIC_KEY, TrajectoryGroup
from torch import Tensor

from tokcredit.adapters import two_phase
from tokcredit.adapters.rows import Fields, HostRows, host_rows
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts


def assemble_training_data(
    objective: Objective, trajectory_groups: Sequence[TrajectoryGroup], include_provenance: bool = True
) -> tuple[list[tinker.Datum], list[dict[str, int]]]:
    """Return the data of the cookbook's function of this name, with advantages of tokens.

    Args:
        objective: Its credit and token weights make the advantages. ``rollout_log_probs`` are those of the sampler.
        trajectory_groups: Groups of trajectories.
        include_provenance: As in the cookbook.

    Raises:
        ValueError: The objective has filters, reads another input or has settings that change during training, a reward
            is not finite, or an action has no token before it.
    """
    part, groups = two_phase.advantage_part(objective, "Tinker"), list(trajectory_groups)
    zeros = [torch.zeros(len(group.trajectories_G)) for group in groups]
    data, origins = data_processing.assemble_training_data(groups, zeros, include_provenance)
    if not data:
        return data, origins

    def flat(name: str) -> Tensor:
        return torch.cat([datum.loss_fn_inputs[name].to_torch() for datum in data])

    mask, names = flat("mask") != 0, [(x["group_idx"], x["traj_idx"]) for x in origins]
    sizes = [len(datum.loss_fn_inputs["mask"].data) for datum in data]
    turns, numbers = _turns(groups)
    if turns.token_rewards is None or turns.token_rewards.numel() != int(mask.count_nonzero()):
        raise ValueError("ob: expected at least one token before the first action of a trajectory, got none")
    batch = Rollouts(
        flat("target_tokens"),
        torch.tensor([0, *sizes]).cumsum(0),
        torch.tensor([group for group, _ in names]),
        torch.tensor([float(groups[g].final_rewards_G[t]) for g, t in names]),
        mask,
        rollout_log_probs=flat("logprobs").float(),
        trajectory_ids=two_phase.group_ids(names),
        extras={"turn_ids": torch.zeros(len(mask), dtype=torch.long).masked_scatter(mask, numbers)},
    )
    # Tinker told rewards of turns and outcomes apart, also where both have the same sum.
    batch = batch.with_inputs(token_rewards=torch.zeros(len(mask)).masked_scatter(mask, turns.token_rewards))
    found = two_phase.advantages(part, batch, "Tinker").float().split(sizes)
    for datum, advantages in zip(data, found, strict=True):
        datum.loss_fn_inputs["advantages"] = tinker.TensorData.from_torch(advantages)
    return data, origins


def _turns(groups: list[TrajectoryGroup]) -> tuple[HostRows, Tensor]:
    """Return the reward and the turn of each token that trains, in the order of the data."""
    steps: list[tuple[int, int, int, Any]] = [
        (g, t, k, transition)
        for g, group in enumerate(groups)
        for t, trajectory in enumerate(group.trajectories_G)
        for k, transition in enumerate(trajectory.transitions)
    ]
    counts = torch.tensor(
        [0 if x.metrics.get(PARSE_ERROR_MASKED_METRIC_KEY, 0.0) >= 1 else len(x.ac.tokens) for *_, x in steps]
    )
    trained = torch.arange(int(counts.max())) < counts[:, None]
    names = [(g, t) for g, t, *_ in steps]
    rewards = torch.tensor([float(x.reward) for *_, x in steps], dtype=torch.float64)
    fields = Fields("trajectory", "group_idx", "reward")
    rows = host_rows(names, [g for g, _ in names], rewards, trained, "sum", fields)
    assert rows.token_rewards is not None
    numbers = torch.tensor([k for _, _, k, _ in steps]).repeat_interleave(counts)
    return rows._replace(token_rewards=rows.token_rewards[trained]), numbers
