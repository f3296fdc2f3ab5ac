"""slime: ``--custom-advantage-function-path`` with the credit of any method.

slime calls that function on each rank with the rows that the rank trains, which need not be whole groups: a rank's rows
are every n-th, or balanced by length. So the ranks show each other their rows first. In a module of your own::

    from tokcredit.adapters import slime

    credit = slime.advantages(tc.methods.tempo())

and ``--custom-advantage-function-path my.credit --disable-rewards-normalization``. Loss, clip and reduction stay
slime's. Not on PyPI: written from slime's sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokcredit.adapters import split
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts

_SHOWN = ("sample_indices", "tokens", "response_lengths", "loss_masks", "rewards")


def advantages(objective: Objective) -> Callable[[Any, dict[str, Any]], None]:
    """The function that slime calls: ``(args, rollout_data) -> None``, adding ``advantages`` and ``returns``.

    Raises:
        ValueError: a stage cannot be carried.
    """
    paying = split.payer(objective, "slime")
    if paying.required_inputs:
        raise ValueError(
            f"objective: expected credit and weights stages that read tokens and rewards only, got {paying!r}, which "
            f"needs {', '.join(sorted(paying.needs))}"
        )

    def credit(args: Any, rollout_data: dict[str, Any]) -> None:
        _check(args, rollout_data)
        paid = _pay(paying, args.n_samples_per_prompt, _everywhere({name: rollout_data[name] for name in _SHOWN}))
        device = rollout_data["tokens"][0].device if rollout_data["tokens"] else None
        rollout_data["advantages"] = [paid[row].to(device) for row in rollout_data["sample_indices"]]
        rollout_data["returns"] = rollout_data["advantages"]

    return credit


def _check(args: Any, rollout_data: Mapping[str, Any]) -> None:
    if args.rewards_normalization:
        raise ValueError(
            "rewards_normalization: expected False (--disable-rewards-normalization), because the objective's credit "
            "stage scales rewards, got True"
        )
    for name, expected in (("normalize_advantages", False), ("kl_coef", 0), ("context_parallel_size", 1)):
        if (value := getattr(args, name)) != expected:
            raise ValueError(f"{name}: expected {expected}, because the objective pays whole rows, got {value}")
    if missing := [name for name in _SHOWN if name not in rollout_data]:
        raise RuntimeError(f"{missing[0]}: expected in slime's rollout data, got {', '.join(rollout_data)}")


def _everywhere(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all ranks that train different rows."""
    if not dist.is_initialized():
        return [rows]
    from megatron.core import mpu

    group = mpu.get_data_parallel_group(with_context_parallel=False)
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, {name: [_cpu(x) for x in values] for name, values in rows.items()}, group=group)
    return out


def _cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def _pay(objective: Objective, size: int, ranks: list[dict[str, Any]]) -> dict[int, Tensor]:
    """What each token of each row is paid, by the row's sample: slime numbers those of a prompt one after another."""
    whole = {name: [_cpu(x) for rank in ranks for x in rank[name]] for name in _SHOWN}
    lengths = whole["response_lengths"]
    numbers = torch.tensor([int(row) for row in whole["sample_indices"]], dtype=torch.long)
    if numbers.unique().numel() != len(numbers):
        raise ValueError("sample_indices: expected one row per sample, because a row is a rollout, got several")
    responses = [torch.as_tensor(t)[len(t) - n :] for t, n in zip(whole["tokens"], lengths, strict=True)]
    batch = Rollouts(
        torch.cat(responses),
        torch.tensor([0, *lengths]).cumsum(0),
        numbers // size,
        torch.tensor(whole["rewards"], dtype=torch.float32),
        torch.cat([torch.as_tensor(mask) for mask in whole["loss_masks"]]) != 0,
    )
    return dict(zip(numbers.tolist(), split.pay(objective, batch, "slime").split(lengths), strict=True))
