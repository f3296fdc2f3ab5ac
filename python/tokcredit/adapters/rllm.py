"""rLLM: the advantages of an objective in ``Step.advantage``, one number for each token of a response.

rLLM trains advantages that steps have already. Its verl backend also runs with :mod:`tokcredit.adapters.verl` and
``algorithm.tokcredit_rows.trajectory_field=step_ids``. rLLM is not on PyPI; this follows its sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from tokcredit.adapters import two_phase
from tokcredit.adapters.rows import Fields, host_rows, known_rule
from tokcredit.objective import Objective


def assign(objective: Objective, episodes: Iterable[Any], *, reward_rule: str = "same") -> None:
    """Set ``Step.advantage`` of all steps to lists as long as ``response_ids``.

    Trajectories of one name in episodes of one task are a group. An episode is named ``TASK:NUMBER``.

    Args:
        objective: Its credit and token weights make the advantages. ``rollout_log_probs`` are ``Step.logprobs``.
        episodes: rLLM's episodes, with whole groups.
        reward_rule: ``same`` reads ``Trajectory.reward``; the others ``Step.reward``, see
            :func:`tokcredit.adapters.rows.host_rows`.

    Raises:
        ValueError: The objective has filters, reads another input or has settings that change during training, there is
            no such rule, a reward is missing, or a trajectory is in two groups.
    """
    part, rule = two_phase.advantage_part(objective, "rLLM"), known_rule(reward_rule)
    steps = [
        (trajectory, step, (episode.id.rpartition(":")[0], trajectory.name))
        for episode in episodes
        for trajectory in episode.trajectories
        for step in trajectory.steps
    ]
    if not steps:
        return
    field = "Trajectory.reward" if rule == "same" else "Step.reward"
    given = [trajectory.reward if rule == "same" else step.reward for trajectory, step, _ in steps]
    for row, x in enumerate(given):
        if x is None:
            raise ValueError(f"{field}: expected a number, got None in row {row}, of trajectory {steps[row][0].uid!r}")
    lengths = torch.tensor([len(step.response_ids) for _, step, _ in steps])
    tokens = pad_sequence([torch.tensor(step.response_ids, dtype=torch.long) for _, step, _ in steps], batch_first=True)
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    prompts = [torch.tensor(step.prompt_ids, dtype=torch.long) for _, step, _ in steps]
    named = {"context_keys": two_phase.context_keys(prompts)}
    if all(step.logprobs is not None and len(step.logprobs) == len(step.response_ids) for _, step, _ in steps):
        rows = [torch.tensor(step.logprobs, dtype=torch.float32) for _, step, _ in steps]
        named["rollout_log_probs"] = pad_sequence(rows, batch_first=True)
    groups = [group for *_, group in steps]
    fields = Fields("Trajectory.uid", "Episode.id, Trajectory.name", field)
    rewards = torch.tensor(given, dtype=torch.float64)
    found = two_phase.advantages_padded(
        part,
        tokens,
        real,
        real,
        two_phase.group_ids(groups),
        host_rows([trajectory.uid for trajectory, *_ in steps], groups, rewards, real, rule, fields),
        "rLLM",
        **named,
    )
    for (_, step, _), advantages, length in zip(steps, found.tolist(), lengths.tolist(), strict=True):
        step.advantage = advantages[:length]
