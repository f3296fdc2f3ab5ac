"""slime: the credit of any method for ``--custom-advantage-function-path``.

slime calls that function on each rank with the rows that the rank trains. These need not be whole groups: a rank has
every n-th row, or rows balanced by length. The ranks therefore exchange their rows first. In a module of your own::

    import tokcredit as tc
    from tokcredit.adapters import slime

    credit = slime.advantages(tc.methods.tempo())

Start slime with ``--custom-advantage-function-path my.credit --disable-rewards-normalization``. Loss, clip and
reduction stay those of slime. slime is not on PyPI; this follows its sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import require
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts

_EXCHANGED = ("sample_indices", "tokens", "response_lengths", "loss_masks", "rewards")


def advantages(objective: Objective) -> Callable[[Any, dict[str, Any]], None]:
    """Return the function ``(args, rollout_data) -> None`` that slime calls to add ``advantages`` and ``returns``.

    Args:
        objective: Its credit and token weights make the advantages; slime does the rest.

    Raises:
        ValueError: The objective has filters, reads an input, or has settings that change during training.
    """
    part = two_phase.advantage_part(objective, "slime")
    require(part, (), "slime")

    def credit(args: Any, rollout_data: dict[str, Any]) -> None:
        _check(args, rollout_data)
        rows = _of_all_ranks({name: rollout_data[name] for name in _EXCHANGED})
        by_sample = _advantages(part, args.n_samples_per_prompt, rows)
        device = rollout_data["tokens"][0].device if rollout_data["tokens"] else None
        rollout_data["advantages"] = [by_sample[row].to(device) for row in rollout_data["sample_indices"]]
        rollout_data["returns"] = rollout_data["advantages"]

    return credit


def _check(args: Any, rollout_data: Mapping[str, Any]) -> None:
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
    if missing := [name for name in _EXCHANGED if name not in rollout_data]:
        raise RuntimeError(f"{missing[0]}: expected in slime's rollout data, got {', '.join(rollout_data)}")


def _of_all_ranks(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of every rank that trains rows of its own."""
    if not dist.is_initialized():
        return [rows]
    from megatron.core import mpu

    group = mpu.get_data_parallel_group(with_context_parallel=False)
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, {name: [_cpu(x) for x in values] for name, values in rows.items()}, group=group)
    return out


def _cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def _advantages(objective: Objective, size: int, ranks: list[dict[str, Any]]) -> dict[int, Tensor]:
    """Return the advantages of each row by its sample number; slime numbers the samples of a prompt consecutively."""
    whole = {name: [_cpu(x) for rank in ranks for x in rank[name]] for name in _EXCHANGED}
    lengths = whole["response_lengths"]
    numbers = torch.tensor([int(row) for row in whole["sample_indices"]], dtype=torch.long)
    if numbers.unique().numel() != len(numbers):
        raise ValueError("sample_indices: expected one row per sample, got several rows of one sample")
    responses = [torch.as_tensor(t)[len(t) - n :] for t, n in zip(whole["tokens"], lengths, strict=True)]
    batch = Rollouts(
        torch.cat(responses),
        torch.tensor([0, *lengths]).cumsum(0),
        numbers // size,
        torch.tensor(whole["rewards"], dtype=torch.float32),
        torch.cat([torch.as_tensor(mask) for mask in whole["loss_masks"]]) != 0,
    )
    return dict(zip(numbers.tolist(), two_phase.advantages(objective, batch, "slime").split(lengths), strict=True))
