"""Rows of a host as trajectories: which rows are one episode, in which order, and what the reward of a row means."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

REWARD_RULES = ("same", "last", "split", "sum")
"""What the rewards of the rows of a trajectory are: see :func:`host_rows`."""


class Fields(NamedTuple):
    """Names of a host, for errors.

    Attributes:
        trajectory: Field that says which rows are one trajectory.
        group: Field that says which rows share a prompt.
        reward: Field with the rewards.
        place: Field with the place of a row in its trajectory.
    """

    trajectory: str
    group: str
    reward: str
    place: str = ""


class HostRows(NamedTuple):
    """Trajectories and rewards of a host's rows, as :class:`~tokcredit.Rollouts` takes them.

    Attributes:
        trajectory_ids: int64 ``[R]``.
        rewards: float32 ``[R]``, the outcome of each row's trajectory, or None.
        token_rewards: float32 ``(R, T)``, 0 where the policy did not choose the token, or None.
        order: int64 ``[R]``, the rows in an order in which each trajectory reads, or None if they are in one.
    """

    trajectory_ids: Tensor
    rewards: Tensor | None
    token_rewards: Tensor | None = None
    order: Tensor | None = None


def known_rule(rule: str) -> str:
    """Return a reward rule.

    Args:
        rule: The rule.

    Raises:
        ValueError: There is no such rule.
    """
    if rule not in REWARD_RULES:
        raise ValueError(f"reward_rule: expected one of {', '.join(REWARD_RULES)}, got {rule!r}")
    return rule


def host_rows(
    trajectories: Sequence[Hashable],
    groups: Sequence[Hashable],
    rewards: Any,
    response_mask: Tensor,
    rule: str,
    fields: Fields,
    places: Sequence[int] | None = None,
) -> HostRows:
    """Return the trajectories and the rewards of a host's rows.

    The rule says what the reward of a row is, where a trajectory with reward ``x`` has K rows::

        same   x in every row
        last   x in the last row; the rewards of the other rows are not read
        split  x / K in every row
        sum    a reward of the row itself

    With the first three, ``rewards`` are outcomes; rewards of tokens are summed over their row before. With ``sum``
    they are ``token_rewards``: the reward of a row is at its last token that the policy chose, and the reward of a
    token that the policy did not choose at the last one before it in the trajectory, or at the first one after it.

    Args:
        trajectories: Name of the trajectory of each row.
        groups: Name of the prompt of each row.
        rewards: float ``[R]``, or of tokens ``(R, T)``.
        response_mask: ``(R, T)``, nonzero where the policy chose the token.
        rule: One of :data:`REWARD_RULES`.
        fields: The host's names, for errors.
        places: Place of each row in its trajectory. None if the rows of each trajectory are in order.

    Raises:
        ValueError: The rule is unknown, a trajectory has rows in several groups or two rows at one place, a reward is
            not finite, or rewards of a trajectory contradict the rule.
    """
    rule = known_rule(rule)
    ids = _numbered(trajectories)
    first = np.unique(ids, return_index=True)[1]

    def check_same(field: str, x: NDArray[Any], shown: Sequence[Any], what: str) -> None:
        if (wrong := np.flatnonzero(x != x[first[ids]])).size:
            r = int(wrong[0])
            f = int(first[ids[r]])
            raise ValueError(
                f"{field}: expected {what} in all rows of {fields.trajectory} {trajectories[r]!r}, got {shown[r]!r} "
                f"in row {r} beside {shown[f]!r} in row {f}"
            )

    check_same(fields.group, _numbered(groups), groups, "one group")
    at = np.arange(len(ids)) if places is None else np.asarray(places, dtype=np.int64)
    order = np.lexsort((at, ids))
    follows = np.diff(ids[order]) == 0
    twice = np.flatnonzero(follows & (np.diff(at[order]) == 0))
    if twice.size:
        f, r = sorted(order[twice[0] : twice[0] + 2].tolist())
        raise ValueError(
            f"{fields.place}: expected another number in each row of {fields.trajectory} {trajectories[r]!r}, got "
            f"{at[r]} in rows {f} and {r}"
        )
    given = torch.as_tensor(rewards).detach().cpu()
    if given.dim() > 1:
        given = given.float() if rule == "sum" else given.sum(1, dtype=torch.float64)
    x = given.numpy() if given.dim() > 1 else given.double().numpy()
    if (wrong := np.argwhere(~np.isfinite(x))).size:
        r = int(wrong[0, 0])
        raise ValueError(f"{fields.reward}: expected finite numbers, got {x[tuple(wrong[0])]} in row {r}")
    device = response_mask.device
    ordered = torch.from_numpy(order).to(device) if (follows & (np.diff(order) < 0)).any() else None
    numbers = torch.from_numpy(ids).to(device)
    if rule == "sum":
        dense = _on_chosen(x, response_mask.cpu().numpy() != 0, ids, order)
        return HostRows(numbers, None, torch.from_numpy(dense).float().to(device), ordered)
    if rule == "last":
        last = order[np.flatnonzero(np.diff(ids[order], append=-1))]
        total = x[last][ids]
    else:
        check_same(fields.reward, x, x.tolist(), f"the same reward (reward_rule {rule!r})")
        total = x if rule == "same" else x * np.bincount(ids)[ids]
    return HostRows(numbers, torch.from_numpy(total).float().to(device), None, ordered)


def _numbered(names: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return names as numbers, in the order in which they first occur."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)


def _on_chosen(x: NDArray[Any], mask: NDArray[Any], ids: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[Any]:
    """Return rewards ``(R, T)`` at tokens that the policy chose."""
    rows, width = mask.shape
    if x.ndim == 1:
        of_rows, x = x, np.zeros(mask.shape)
        if width:
            x[:, -1] = of_rows
    if not ((x != 0) & ~mask).any():
        return x
    flat, chosen = x[order].reshape(-1), mask[order].reshape(-1)
    of = ids[order].repeat(width)
    at = np.flatnonzero((flat != 0) & ~chosen)
    place = np.arange(rows * width)
    before = np.maximum.accumulate(np.where(chosen, place, -1))[at]
    after = np.minimum.accumulate(np.where(chosen, place, rows * width)[::-1])[::-1][at]
    follows = (before >= 0) & (of[before] == of[at])
    precedes = (after < rows * width) & (of[after - (after == rows * width)] == of[at])
    target, kept = np.where(follows, before, after), follows | precedes
    moved, flat[at] = flat[at], 0
    np.add.at(flat, target[kept], moved[kept])
    out = np.empty_like(x)
    out[order] = flat.reshape(rows, width)
    return out
