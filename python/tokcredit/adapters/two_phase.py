"""An objective in two parts, for hosts that compute advantages in one place and the loss in another.

:func:`advantage_part` keeps the stages that make the advantages, :func:`loss_part` those that make the loss from
advantages. From the first place to the second such a host carries one number per token and nothing else::

    first, second = advantage_part(objective, "my host"), loss_part(objective, "my host", "kl_coef")
    A = advantages(first, batch, "my host")
    out = loss(second, log_probs, old_log_probs, A, response_mask)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokcredit import inputs
from tokcredit.adapters.capabilities import (
    arguments,
    given_advantages,
    given_weights,
    require,
    require_constant,
    require_independent_rows,
)
from tokcredit.adapters.rows import HostRows
from tokcredit.blocks import tree
from tokcredit.objective import Objective
from tokcredit.protocol import Loss
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages.aggregation import Aggregation
from tokcredit.stages.credit.group import per_token


def advantage_part(objective: Objective, host: str) -> Objective:
    """Return the objective with its credit and token weights; its other stages are defaults.

    Args:
        objective: Any objective.
        host: Name of the host for errors.

    Raises:
        ValueError: The objective has filters, or a setting changes during training.
    """
    if objective.filters:
        raise ValueError(
            f"objective: expected no filters, because {host} counts its denominators from its own mask, "
            f"got {objective.filters!r}; use a token weight such as token_weights.within"
        )
    part = Objective(objective.credit, token_weights=objective.token_weights)
    require_constant(part, host)
    return part


def loss_part(objective: Objective, host: str, kl_setting: str) -> Objective:
    """Return the objective with its ratio, clip, scales and aggregation; its advantages are those that the host passes.

    Args:
        objective: Any objective.
        host: Name of the host for errors.
        kl_setting: The host's own setting for a KL term.

    Raises:
        ValueError: A stage reads what the policy loss of the host does not get, or a setting changes during training.
    """
    part = Objective(
        given_advantages(),
        ratio=objective.ratio,
        clip=objective.clip,
        scales=objective.scales,
        aggregation=objective.aggregation,
    )
    require_independent_rows(part, host)
    for stage in (part.clip, *part.scales):
        if stage.compares_groups or any(x.reads_rollouts for x in stage.stages()):
            raise ValueError(
                f"objective: expected a {stage.kind} stage that reads neither token ids nor groups, because the policy "
                f"loss of {host} gets none, got {stage!r}"
            )
    require_constant(part, host)
    if objective.terms:
        raise ValueError(
            f"objective: expected no terms, because {host} adds its own ({kl_setting} for KL), got {objective.terms!r}"
        )
    require(part, {"advantages", "old_log_probs"}, f"the policy loss of {host}")
    if part.aggregation.reads_signs or "groups" in part.aggregation.counts:
        raise ValueError(
            f"objective: expected an aggregation stage without group statistics, because the policy loss of {host} "
            f"gets no groups, got {part.aggregation!r}"
        )
    return part


def require_rows_cut(part: Objective, host: str) -> None:
    """Check that the loss of a row does not depend on the other rows of its trajectory, which the host passes alone.

    Args:
        part: From :func:`loss_part`.
        host: Name of the host for errors.

    Raises:
        ValueError: A ratio, scale or bound depends on other tokens of the trajectory, or the aggregation counts rows.
    """
    if not part.aggregation.counts <= {"tokens"}:
        raise ValueError(
            f"objective: expected an aggregation stage over tokens, because {host} averages over rows and a trajectory "
            f"has several, got {part.aggregation!r}"
        )
    one, row = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    batch = Rollouts(row, torch.tensor([0, 1]), row, one, old_log_probs=one, extras={"advantages": one})
    if part.prepare(batch).couples_tokens:
        raise ValueError(
            f"objective: expected a loss of single tokens, because {host} passes the rows of a trajectory one by one, "
            f"got {part!r}"
        )


def denominator(objective: Objective, host: str) -> str:
    """Return the number that the host divides a sum by: ``batch_num_tokens`` or ``global_batch_size``.

    Args:
        objective: The objective.
        host: Name of the host for errors.

    Raises:
        ValueError: The aggregation is no mean, or its length depends on the batch, of which the host shows a part.
    """
    stage = objective.aggregation
    if stage.reads_width:
        raise ValueError(
            f"objective: expected a length in the aggregation stage, because {host} shows the loss a part of the "
            f"batch, got {stage!r}"
        )
    if stage.counts == {"tokens"}:
        return "batch_num_tokens"
    if stage.counts == {"rows"}:
        return "global_batch_size"
    raise ValueError(f"objective: expected an aggregation stage that is a mean, got {stage!r}")


def host_aggregation(stage: Aggregation, names: Mapping[type[Aggregation], str], host: str) -> str:
    """Return the host's name of an aggregation.

    Args:
        stage: The aggregation.
        names: Names of the host by class of aggregation.
        host: Name of the host for the error.

    Raises:
        ValueError: The host has no such aggregation.
    """
    for kind, name in names.items():
        if isinstance(stage, kind):
            return name
    known = ", ".join(f"aggregation.{kind.__name__}" for kind in names)
    raise ValueError(f"objective: expected one of {known}, which {host} has too, got {stage!r}")


def advantages(objective: Objective, batch: Rollouts, host: str) -> Tensor:
    """Return the advantage of each token times its weight, in the layout of the batch.

    Args:
        objective: From :func:`advantage_part`.
        batch: The rollouts, with whole groups.
        host: Name of the host for errors.

    Returns:
        float ``(B, T)`` or ``[N]``, 0 where the policy did not choose the token.

    Raises:
        ValueError: The batch lacks an input, or a token weight is negative.
    """
    require(objective, [name for name in inputs.names() if batch.has_input(name)], f"{host} with this batch")
    prepared = objective.prepare(batch)
    if prepared.multiplier is None:
        return prepared.advantages
    if bool((prepared.multiplier < 0).any()):
        raise ValueError(
            f"objective: expected token weights of at least 0, because {host} gets them as part of the advantages and "
            f"the sign of an advantage decides which bound clips, got {float(prepared.multiplier.min())}"
        )
    return prepared.advantages * batch.shaped(per_token(prepared.multiplier, batch.spans))


def advantages_padded(
    objective: Objective,
    tokens: Tensor,
    real: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    rewards: Tensor | HostRows,
    host: str,
    **named: Tensor,
) -> Tensor:
    """Return :func:`advantages` of rows that are padded on either side, 0 on padding.

    Args:
        objective: From :func:`advantage_part`.
        tokens: Integers ``(B, T)``.
        real: ``(B, T)``, nonzero on real tokens.
        response_mask: ``(B, T)``, nonzero where the policy chose the token.
        group_ids: Integers ``(B,)``.
        rewards: float ``(B,)``, one trajectory per row; or trajectories and rewards.
        host: Name of the host for errors.
        named: Per-token inputs by name, ``(B, T)`` each, and ``context_keys (B,)``.

    Returns:
        float ``(B, T)``.

    Raises:
        ValueError: The batch lacks an input, or a token weight is negative.
    """
    if isinstance(rewards, Tensor):
        rewards = HostRows(torch.arange(len(tokens), device=tokens.device), rewards)
    dense, keys = named.pop("token_rewards", rewards.token_rewards), named.pop("context_keys", None)
    outcomes = rewards.rewards
    if outcomes is None and dense is not None:
        outcomes = torch.zeros(len(tokens), device=tokens.device)

    def ordered(x: Any) -> Any:
        return x if x is None or rewards.order is None else x[rewards.order]

    keep = ordered(real != 0)
    edges = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.sum(1).cumsum(0)])
    batch = Rollouts(
        ordered(tokens)[keep],
        edges,
        ordered(group_ids),
        ordered(outcomes),
        ordered(response_mask != 0)[keep],
        trajectory_ids=ordered(rewards.trajectory_ids),
        **arguments({name: ordered(x)[keep] for name, x in named.items()}),
    )
    if keys is not None:
        batch = batch.with_inputs(context_keys=ordered(keys))
    if dense is not None:
        # The host told rewards of tokens and outcomes apart, also where both have the same sum.
        batch = batch.with_inputs(token_rewards=ordered(dense)[keep])
    found = advantages(objective, batch, host)
    out = torch.zeros(tokens.shape, dtype=found.dtype, device=found.device).masked_scatter_(keep, found)
    return out if rewards.order is None else out.index_select(0, rewards.order.argsort())


def context_keys(contexts: Sequence[Tensor]) -> Tensor:
    """Return ``context_keys`` of rows, int64 ``[R]``.

    Args:
        contexts: Token ids of all that the policy saw before each row.
    """
    edges = torch.tensor([0, *(len(x) for x in contexts)]).cumsum(0)
    return tree.context_keys(torch.cat([edges[:0], *(x.long() for x in contexts)]), Spans.from_cu_seqlens(edges))


def group_ids(names: Iterable[Any]) -> Tensor:
    """Return group ids of rows whose prompts are named by strings or numbers.

    Args:
        names: Name of the prompt of each row.

    Returns:
        int64 ``(B,)``.
    """
    known: dict[Any, int] = {}
    return torch.tensor([known.setdefault(name, len(known)) for name in names], dtype=torch.long)


def from_first_response(response_mask: Tensor) -> Tensor:
    """Return where rows that hold their prompts have reached the first token that the policy chose.

    Args:
        response_mask: ``(B, T)``, nonzero where the policy chose the token.

    Returns:
        bool ``(B, T)``.
    """
    return (response_mask != 0).cumsum(1) > 0


def prompt_groups(tokens: Tensor, response_mask: Tensor) -> Tensor:
    """Return group ids of rows that hold their prompts: rows that are equal up to the first response token are a group.

    Args:
        tokens: Integers ``(B, T)``.
        response_mask: ``(B, T)``, nonzero where the policy chose the token.

    Returns:
        int64 ``(B,)``.
    """
    return torch.where(from_first_response(response_mask), -1, tokens).unique(dim=0, return_inverse=True)[1]


def loss(
    objective: Objective,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    **denominators: Any,
) -> Loss:
    """Return the loss of a micro-batch from the advantages of its tokens.

    Args:
        objective: From :func:`loss_part`.
        log_probs: float ``(B, T)``, or ``[N]`` packed.
        old_log_probs: float, in the same shape.
        advantages: float, in the same shape.
        response_mask: Nonzero where the policy chose the token, in the same shape.
        cu_seqlens: Integers ``[R + 1]``, offsets of packed rows; None for one row.
        weights: Factors of the token losses, float, in the same shape, or None.
        denominators: As in :meth:`tokcredit.Objective.prepare`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A shape is wrong, or a denominator is missing or too small.
    """
    extras = {"advantages": advantages.reshape(-1)}
    if weights is not None:
        extras["weights"] = weights.reshape(-1)
        objective = replace(objective, token_weights=(given_weights(),))
    mask, device = response_mask != 0, log_probs.device
    if log_probs.dim() == 1 and cu_seqlens is None:
        cu_seqlens = torch.tensor([0, log_probs.numel()], device=device)
    # No stage of the part reads token ids, groups or rewards, of which the host gives none here.
    rows = torch.arange(len(log_probs) if cu_seqlens is None else len(cu_seqlens) - 1, device=device)
    tokens = torch.zeros_like(mask, dtype=torch.int32)
    rewards = torch.zeros_like(rows, dtype=torch.float32)
    if cu_seqlens is None:
        batch = Rollouts.from_padded(tokens, mask, rows, rewards, extras=extras, old_log_probs=old_log_probs)
    else:
        batch = Rollouts(tokens, cu_seqlens, rows, rewards, mask, old_log_probs, extras=extras)
    return objective.loss(objective.prepare(batch, **denominators), log_probs)


def metrics(out: Loss) -> dict[str, float]:
    """Return the metrics of tokens as numbers, named ``tokcredit/NAME``, in one transfer from the device.

    The loss and the number of tokens are left out: hosts have their own.

    Args:
        out: From :func:`loss`.
    """
    names = [name for name in out.metrics if name not in ("loss", "policy_loss", "tokens")]
    values = torch.stack([out.metrics[name].double() for name in names]).tolist()
    return {f"tokcredit/{name}": value for name, value in zip(names, values, strict=True)}
