"""An objective in two parts, for hosts that pay the tokens in one place and take the loss in another.

:func:`payer` keeps the stages that decide what a token is paid, :func:`surrogate` those that make a loss of advantages
which the host hands on. Between the two a host carries nothing but one number per token.
"""

from __future__ import annotations

from dataclasses import replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from tokcredit.stages import aggregation, clip, scale, term
from tokcredit.adapters.capabilities import given, require
from tokcredit.objective import Objective
from tokcredit.prepared import per_token
from tokcredit.rollouts import Rollouts

# What can be decided without token ids, groups and rewards, none of which a host gives to its policy loss.
_CLIPS = (clip.ppo, clip.growing, clip.weighted, clip.soft, clip.unclipped)
_GAINS = (NoneType, scale.divergence)
_AGGREGATIONS = (aggregation.token_mean, aggregation.token_sum, aggregation.sequence_mean, aggregation.sequence_sum)
_COUNTED: dict[type, str] = {
    aggregation.token_mean: "batch_num_tokens",
    aggregation.sequence_mean: "global_batch_size",
    aggregation.sequence_sum: "global_batch_size",
}


def _steady(objective: Objective, host: str) -> None:
    if objective.is_scheduled:
        raise ValueError(
            f"objective: expected settings that do not change, as {host} tells no progress, got {objective!r}"
        )


def payer(objective: Objective, host: str) -> Objective:
    """The objective with the stages that pay, checked; the others are defaults.

    Raises:
        ValueError: it selects rows, or a setting changes during training.
    """
    paid = replace(objective, ratio=Objective().ratio, clip=Objective().clip, gain=None, kl=None)
    _steady(paid, host)
    if objective.sampling is not None:
        raise ValueError(
            f"objective: expected no sampling stage, because {host} counts its denominators from its own mask, "
            f"got {objective.sampling!r}"
        )
    return paid


def surrogate(objective: Objective, host: str, penalty: str) -> Objective:
    """The objective with the stages that make the loss, checked; its credit is what the host says was paid.

    Args:
        objective: any.
        host: its name, for messages.
        penalty: the host's own setting for what the kl stage does.

    Raises:
        ValueError: a stage reads what the host's policy loss does not have, or a setting changes during training.
    """
    objective = replace(objective, credit=given("advantages"), weights=(), sampling=None)
    for stage, carried in (("clip", _CLIPS), ("gain", _GAINS)):
        if type(choice := getattr(objective, stage)) not in carried:
            raise ValueError(
                f"objective: expected a {stage} stage that reads neither token ids nor groups, which {host}'s policy "
                f"loss does not have, got {choice!r}"
            )
    _steady(objective, host)
    if objective.kl is not None:
        raise ValueError(f"objective: expected no kl stage, for which {host} has {penalty}, got {objective.kl!r}")
    require(objective, {"advantages", "old_log_probs"}, f"{host}'s policy loss")
    if type(objective.aggregation) not in _AGGREGATIONS:
        raise ValueError(
            f"objective: expected an aggregation stage without group statistics, which {host}'s policy loss does not "
            f"have, got {objective.aggregation!r}"
        )
    return objective


def counted(objective: Objective, host: str) -> str:
    """Which number the host divides the sum by: ``batch_num_tokens`` or ``global_batch_size``.

    Raises:
        ValueError: neither, or the length of a mean of sums is left to the batch, of which the host shows a part.
    """
    aggregate = objective.aggregation
    if isinstance(aggregate, aggregation.sequence_sum) and aggregate.length is None:
        raise ValueError(
            f"objective: expected a length in the aggregation stage, because {host} shows a part of the batch, "
            f"got {aggregate!r}"
        )
    if (name := _COUNTED.get(type(aggregate))) is None:
        raise ValueError(f"objective: expected an aggregation stage that is a mean, got {aggregate!r}")
    return name


def pay(objective: Objective, batch: Rollouts, host: str) -> Tensor:
    """What each token is paid, in the layout of the batch, with the weights that multiply it.

    Raises:
        ValueError: the batch lacks evidence, a weight selects tokens, or one is negative.
    """
    prepared = objective.prepare(batch)
    if not torch.equal(prepared.mask, batch.response_mask):
        raise ValueError(
            f"objective: expected weights stages that multiply, because {host} counts its denominators from its own "
            f"mask, got one that selects among {objective.weights!r}"
        )
    paid = prepared.advantages
    if prepared.multiplier is not None:
        if bool((prepared.multiplier < 0).any()):
            raise ValueError("objective: expected weights of at least 0, which an advantage can absorb, got less")
        paid = paid * batch.shaped(per_token(prepared.multiplier, batch))
    return paid


def pay_padded(
    objective: Objective,
    tokens: Tensor,
    real: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    rewards: Tensor,
    host: str,
    **fields: Tensor,
) -> Tensor:
    """:func:`pay` for rows of ``(B, T)`` tensors that are padded on either side: ``(B, T)``, 0 on padding.

    Args:
        objective: from :func:`payer`.
        tokens: integer ``(B, T)``.
        real: ``(B, T)``, nonzero on real tokens.
        response_mask: ``(B, T)``, nonzero where the policy chose the token.
        group_ids: integer ``(B,)``.
        rewards: float ``(B,)``.
        host: its name, for messages.
        fields: ``old_log_probs`` and the like, each ``(B, T)``.
    """
    require(objective, set(fields), f"{host} with this batch")
    keep = real != 0
    edges = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.sum(1).cumsum(0)])
    batch = Rollouts(
        tokens[keep],
        edges,
        group_ids,
        rewards,
        (response_mask != 0)[keep],
        **{name: x[keep] for name, x in fields.items()},  # type: ignore[arg-type]
    )
    paid = pay(objective, batch, host)
    return torch.zeros(tokens.shape, dtype=paid.dtype, device=paid.device).masked_scatter_(keep, paid)


def numbered(names: Any) -> Tensor:
    """Group ids int64 ``(B,)`` of rows that are named by any strings or numbers."""
    known: dict[Any, int] = {}
    return torch.tensor([known.setdefault(name, len(known)) for name in names], dtype=torch.long)


def responded(response_mask: Tensor) -> Tensor:
    """Where rows ``(B, T)`` that hold their prompts have come to the first chosen token; bool ``(B, T)``."""
    return (response_mask != 0).cumsum(1) > 0


def prompts(tokens: Tensor, response_mask: Tensor) -> Tensor:
    """Group ids int64 ``(B,)`` of rows ``(B, T)`` that hold their prompts: equal up to the first chosen token."""
    return torch.where(responded(response_mask), -1, tokens).unique(dim=0, return_inverse=True)[1]


def evaluate(
    objective: Objective,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    **denominators: Any,
) -> term.Loss:
    """Loss of a micro-batch from the advantages that its tokens were paid.

    Args:
        objective: from :func:`surrogate`.
        log_probs: ``(B, T)``, or ``[N]`` packed.
        old_log_probs: the same shape, as the next two.
        advantages: what each token was paid.
        response_mask: nonzero where the policy chose the token.
        cu_seqlens: where packed rows begin and end; None is one row.
        weights: multiply the tokens' terms, the same shape.
        denominators: those of :meth:`Objective.prepare`.
    """
    extras = {"advantages": advantages.reshape(-1)}
    if weights is not None:
        extras["weights"] = weights.reshape(-1)
        objective = replace(objective, weights=(given("weights"),))
    mask, device = response_mask != 0, log_probs.device
    if log_probs.dim() == 1 and cu_seqlens is None:
        cu_seqlens = torch.tensor([0, log_probs.numel()], device=device)
    rows = torch.arange(len(log_probs) if cu_seqlens is None else len(cu_seqlens) - 1, device=device)
    tokens = torch.zeros_like(mask, dtype=torch.int32)
    rewards = torch.zeros_like(rows, dtype=torch.float32)
    if cu_seqlens is None:
        data = Rollouts.from_padded(tokens, mask, rows, rewards, extras=extras, old_log_probs=old_log_probs)
    else:
        data = Rollouts(tokens, cu_seqlens, rows, rewards, mask, old_log_probs, extras=extras)
    return objective.loss(objective.prepare(data, **denominators), log_probs)


def metrics(out: term.Loss) -> dict[str, float]:
    """The metrics that are means over tokens, as numbers, in one transfer: ``tokcredit/NAME``."""
    names = [name for name in out.metrics if name not in ("loss", "policy_loss", "tokens")]
    values = torch.stack([out.metrics[name].double() for name in names]).tolist()
    return {f"tokcredit/{name}": value for name, value in zip(names, values, strict=True)}
