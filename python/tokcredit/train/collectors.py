"""What an objective needs beside rollouts and rewards, computed by forward passes over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import divergence, log_probs
from tokcredit.inputs import FIELDS
from tokcredit.rollouts import Rollouts
from tokcredit.train.scoring import predict, scores_of

_TEACHER = frozenset({"reverse_kl", "forward_kl"})
_WHOLE_GROUPS = frozenset({"disagreement", "padded_disagreement", "token_probs"})
_ROW_BY_ROW = frozenset({"old_log_probs", "ref_log_probs", "entropies", "squared_probs", "hidden_states"})
COLLECTED = _ROW_BY_ROW | _TEACHER | _WHOLE_GROUPS
"""Names of the evidence that forward passes give."""


def needs_teacher(required_inputs: Iterable[str]) -> bool:
    """Whether another model has to be asked."""
    return bool(_TEACHER.intersection(required_inputs))


@torch.no_grad()
def collect(
    required_inputs: frozenset[str],
    batch: Rollouts,
    size: int,
    model: Any,
    reference: Any = None,
    teacher: Any = None,
    temperature: float = 1.0,
) -> Rollouts:
    """The batch with this evidence.

    The ``old_log_probs`` of replayed rows are their ``rollout_log_probs``: the policy before the update did not draw
    them.

    Args:
        needs: names of evidence; those not among ``COLLECTED`` are left to others.
        batch: whole groups, packed, as :func:`~tokcredit.train.scoring.predict` takes them.
        size: rows of one forward pass at most, except where a group must be seen at once.
        model: the policy before the update.
        reference: for ``ref_log_probs``.
        teacher: for the divergences from it.
        temperature: logits of all of them are divided by it.
    """
    asked = required_inputs & COLLECTED
    if not asked:
        return batch
    order = batch.group_index.argsort(stable=True)
    order = order[(batch.end > batch.begin)[order]]
    groups = batch.group_index[order].unique_consecutive(return_counts=True)[1]
    parts = order.split(groups.tolist() if asked & _WHOLE_GROUPS else size)
    found: dict[str, list[Tensor]] = {name: [] for name in asked}
    for rows in parts:
        for name, value in _of_part(asked, batch.select(rows), model, reference, teacher, temperature).items():
            found[name].append(value)
    back = torch.cat([batch.token_positions(rows)[0] for rows in parts]).argsort()
    whole = {name: _joined(values)[back] for name, values in found.items()}
    if "old_log_probs" in whole and "replayed" in batch.extras:
        replayed = ops.spread(batch.input("replayed"), batch.all_spans, batch.tokens)
        whole["old_log_probs"] = torch.where(replayed, batch.input("rollout_log_probs"), whole["old_log_probs"])
    extras = {name: value for name, value in whole.items() if name not in FIELDS}
    fields: dict[str, Any] = {name: value for name, value in whole.items() if name in FIELDS}
    return dataclasses.replace(batch, **fields, extras={**batch.extras, **extras})


def _joined(values: list[Tensor]) -> Tensor:
    """One after another; of two axes the second is filled up with 0 to the widest."""
    if values[0].dim() == 2:
        width = max(value.shape[1] for value in values)
        values = [torch.nn.functional.pad(value, (0, width - value.shape[1])) for value in values]
    return torch.cat(values)


def _of_part(
    asked: frozenset[str], part: Rollouts, model: Any, reference: Any, teacher: Any, temperature: float
) -> dict[str, Tensor]:
    found = {}
    seen = predict(model, part, hidden_states="hidden_states" in asked)
    found["old_log_probs"], found["entropies"] = scores_of(seen, temperature)
    if "squared_probs" in asked:
        found["squared_probs"] = log_probs.squared_probs(seen.logits, seen.tokens, temperature)[seen.inside]
    if seen.hidden_states is not None:
        found["hidden_states"] = seen.hidden_states[seen.inside].float()
    if "ref_log_probs" in asked:
        found["ref_log_probs"], _ = scores_of(predict(reference, part), temperature)
    if asked & (_TEACHER | _WHOLE_GROUPS):
        logits = seen.logits[seen.inside].float() / temperature
        if "token_probs" in asked:
            found["token_probs"] = log_probs.group_probs(logits, part)
        for name in asked & {"disagreement", "padded_disagreement"}:
            found[name] = divergence.disagreement(logits, part, padded=name == "padded_disagreement")
        if asked & _TEACHER:
            taught = predict(teacher, part).logits[seen.inside].float() / temperature
            found["reverse_kl"] = divergence.kl(logits, taught)
            found["forward_kl"] = divergence.kl(taught, logits)
    return {name: value for name, value in found.items() if name in asked}


def variable(name: str, part: Rollouts, model: Any, teacher: Any, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What an objective of this ``variable`` differentiates, and log-probs and entropies; each ``[N]``.

    Raises:
        ValueError: the variable is neither ``log_probs`` nor ``reverse_kl``.
    """
    seen = predict(model, part)
    log_probs, entropies = scores_of(seen, temperature, overwrite=name == "log_probs")
    if name == "log_probs":
        return log_probs, log_probs, entropies
    if name != "reverse_kl":
        raise ValueError(f"variable: expected log_probs or reverse_kl, got {name!r}")
    with torch.no_grad():
        taught = predict(teacher, part).logits[seen.inside]
    return divergence.kl(seen.logits[seen.inside], taught, temperature), log_probs, entropies
