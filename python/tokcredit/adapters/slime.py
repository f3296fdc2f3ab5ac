"""slime: the credit of any method for ``--custom-advantage-function-path``.

slime calls that function on each rank with the rows that the rank trains. These need not be whole groups: a rank has
every n-th row, or rows balanced by length. The ranks therefore exchange their rows first. In a module of your own::

    import tokcredit as tc
    from tokcredit.adapters import slime

    credit = slime.advantages(tc.methods.tempo())

Start slime with ``--custom-advantage-function-path my.credit --disable-rewards-normalization``. Loss, clip and
reduction stay those of slime. Where a rollout has several rows, ``trajectory_field`` names the key of the rollout data
that says which belong together. slime is not on PyPI; this follows its sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import require
from tokcredit.adapters.rows import Fields, host_rows, known_rule
from tokcredit.objective import Objective

_EXCHANGED = ("sample_indices", "tokens", "response_lengths", "loss_masks", "rewards")


def advantages(
    objective: Objective,
    *,
    trajectory_field: str = "sample_indices",
    group_field: str | None = None,
    reward_rule: str = "same",
) -> Callable[[Any, dict[str, Any]], None]:
    """Return the function ``(args, rollout_data) -> None`` that slime calls to add ``advantages`` and ``returns``.

    Args:
        objective: Its credit and token weights make the advantages; slime does the rest.
        trajectory_field: Key of the rollout data with the trajectory of each row. Its rows are in the order of
            ``sample_indices``, and those with equal numbers in the order in which they lie on their rank.
        group_field: Key with the prompt of each row. None if slime numbered the samples of a prompt consecutively.
        reward_rule: What the reward of a row is; see :func:`tokcredit.adapters.rows.host_rows`. slime's documentation
            divides the reward by the number of rows, ``split``; its ``get_trajectory`` gives each row the whole.

    Raises:
        ValueError: The objective has filters, reads an input, or has settings that change during training, or there is
            no such rule.
    """
    part, rule = two_phase.advantage_part(objective, "slime"), known_rule(reward_rule)
    require(part, ("token_rewards",) if rule == "sum" else (), "slime")
    fields = Fields(trajectory_field, group_field or "sample_indices", "rewards", "sample_indices")
    exchanged = dict.fromkeys([*_EXCHANGED, trajectory_field, fields.group])

    def credit(args: Any, rollout_data: dict[str, Any]) -> None:
        _check(args, rollout_data, exchanged)
        ranks, own = _of_all_ranks({name: [_cpu(x) for x in rollout_data[name]] for name in exchanged})
        first = sum(len(rank["tokens"]) for rank in ranks[:own])
        size = args.n_samples_per_prompt if group_field is None else 1
        found = _advantages(part, size, ranks, rule, fields)
        device = rollout_data["tokens"][0].device if rollout_data["tokens"] else None
        mine = found[first : first + len(rollout_data["tokens"])]
        rollout_data["advantages"] = rollout_data["returns"] = [x.to(device) for x in mine]

    return credit


def _check(args: Any, rollout_data: Mapping[str, Any], exchanged: Iterable[str]) -> None:
    if args.rewards_normalization:
        raise ValueError(
            "rewards_normalization: expected False (--disable-rewards-normalization), because the objective's credit "
            "stage normalizes rewards, got True"
        )
    for name, expected in (("normalize_advantages", False), ("kl_coef", 0), ("context_parallel_size", 1)):
        if (value := getattr(args, name)) != expected:
            raise ValueError(
                f"{name}: expected {expected}, because the objective makes the advantages of whole rows, got {value}"
            )
    if missing := [name for name in exchanged if name not in rollout_data]:
        raise RuntimeError(f"{missing[0]}: expected in slime's rollout data, got {', '.join(rollout_data)}")


def _of_all_ranks(rows: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of every rank that trains rows of its own, and which of the ranks this is."""
    if not dist.is_initialized():
        return [rows], 0
    from megatron.core import mpu

    group = mpu.get_data_parallel_group(with_context_parallel=False)
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, rows, group=group)
    return out, dist.get_rank(group)


def _cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def _advantages(
    objective: Objective, size: int, ranks: list[dict[str, Any]], rule: str, fields: Fields
) -> list[Tensor]:
    """Return the advantages of the rows of all ranks; slime numbers the samples of a prompt consecutively."""
    whole = {name: [x for rank in ranks for x in rank[name]] for name in ranks[0]}
    lengths, names = whole["response_lengths"], [int(x) for x in whole[fields.trajectory]]
    cut = [torch.as_tensor(t).split([len(t) - n, n]) for t, n in zip(whole["tokens"], lengths, strict=True)]
    tokens = pad_sequence([response for _, response in cut], batch_first=True)
    keys = two_phase.context_keys([prompt for prompt, _ in cut])
    mask = pad_sequence([torch.as_tensor(x) for x in whole["loss_masks"]], batch_first=True)
    real = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    prompts = [int(x) // size for x in whole[fields.group]]
    rewards = torch.tensor(whole["rewards"], dtype=torch.float64)
    places = _places(names, ranks, fields)
    rows = host_rows(names, prompts, rewards, mask, rule, fields, places)
    groups = torch.tensor(prompts)
    found = two_phase.advantages_padded(objective, tokens, real, mask, groups, rows, "slime", context_keys=keys)
    return [x[:n] for x, n in zip(found, lengths, strict=True)]


def _places(names: list[int], ranks: list[dict[str, Any]], fields: Fields) -> list[int]:
    """Return places of rows: in the order of their numbers, then in the order in which they lie on a rank."""
    keys = [(int(number), rank) for rank, rows in enumerate(ranks) for number in rows["sample_indices"]]
    on: dict[tuple[int, int], int] = {}
    for row, (name, (number, rank)) in enumerate(zip(names, keys, strict=True)):
        if on.setdefault((name, number), rank) != rank:
            raise ValueError(
                f"sample_indices: expected other numbers in rows of {fields.trajectory} {name} that lie on several "
                f"ranks, because their order is not known, got {number} on ranks {on[name, number]} and {rank} (row "
                f"{row})"
            )
    places = [0] * len(keys)
    for place, row in enumerate(sorted(range(len(keys)), key=lambda row: (keys[row], row))):
        places[row] = place
    return places
