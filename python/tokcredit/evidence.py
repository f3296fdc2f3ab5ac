"""What a batch may carry beside tokens and rewards, by name: the words of ``objective.needs``.

Per-token log-probs and entropies are fields of :class:`~tokcredit.rollouts.Rollouts`; everything else is put in its
``extras``. A name that is not listed here is passed on unchecked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

FIELDS = ("old_log_probs", "rollout_log_probs", "ref_log_probs", "entropies")


class Evidence(NamedTuple):
    """One per token (``[N]`` or the batch's ``(B, T)``) or per row, with further axes where ``axes`` names them."""

    per: str
    kind: str
    meaning: str
    source: str
    axes: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        """As documentation writes it."""
        return f"[{', '.join(('N' if self.per == 'token' else 'R', *self.axes))}]"


KNOWN = {
    "old_log_probs": Evidence(
        "token",
        "float",
        "log-probs under the policy the update starts from, or a replayed row was drawn from",
        "trainer",
    ),
    "rollout_log_probs": Evidence("token", "float", "log-probs under the engine that sampled", "engine"),
    "ref_log_probs": Evidence("token", "float", "log-probs under the reference policy", "reference model"),
    "entropies": Evidence(
        "token", "float", "entropy of the next-token distribution, nats", "`policy.log_probs_and_entropies`"
    ),
    "squared_probs": Evidence(
        "token",
        "float",
        "sum over the vocabulary of squared probabilities, from the distribution of `old_log_probs`",
        "`policy.squared_probs`",
    ),
    "reverse_kl": Evidence(
        "token", "float", "KL(policy || teacher) of the next-token distributions, nats", "`divergence.kl`"
    ),
    "forward_kl": Evidence(
        "token", "float", "KL(teacher || policy) of the next-token distributions, nats", "`divergence.kl`"
    ),
    "disagreement": Evidence(
        "token", "float", "how much the group's rows disagree at this position, 0 to 1", "`divergence.disagreement`"
    ),
    "padded_disagreement": Evidence(
        "token", "float", "the same with padding as uniform distributions", "`divergence.disagreement(padded=True)`"
    ),
    "hidden_states": Evidence(
        "token", "float", "final hidden state that predicts the token, old policy", "trainer, from the model", ("d",)
    ),
    "token_probs": Evidence(
        "token", "float", "probabilities of the K tokens that the group's rows chose", "`policy.group_probs`", ("K",)
    ),
    "state_values": Evidence(
        "token",
        "float",
        "mean reward of continuations from before the token; NaN where none were made",
        "sampler, at `credit.improbable_cuts` or where steps begin",
    ),
    "step_values": Evidence("token", "float", "the same at the first token of every reasoning step", "sampler"),
    "node_ids": Evidence("row", "integer", "the tree node that the row, an edge, leads to; once per group", "sampler"),
    "parent_ids": Evidence(
        "row", "integer", "the node that the edge begins at; no node's number where that is the prompt", "sampler"
    ),
    "answer_probs": Evidence(
        "token",
        "float",
        "mean probability of the true answer's tokens after a step; NaN but at ends of steps",
        "probes",
    ),
    "answer_confidences": Evidence(
        "token", "float", "mean of exp(-mean entropy) over probed answers; NaN but at ends of steps", "probes"
    ),
    "turn_rewards": Evidence(
        "token", "float", "reward of a turn at its last token, 0 elsewhere", "`matching.turn_rewards`, or the trainer"
    ),
    "replayed": Evidence("row", "bool", "drawn at an earlier step, from an older policy", "trainer"),
    "truncated": Evidence("row", "bool", "cut at the greatest length, not ended by the policy", "sampler"),
    "length_values": Evidence(
        "token", "float", "`-(1 - gamma^l)`, l the tokens to go predicted before the token", "a head, see `length`"
    ),
}


def check(name: str, x: Any, tokens: int, rows: int, shape: tuple[int, int] | None) -> Any:
    """The evidence with its tokens in one axis, ``[N, ...]``, or per row, ``[R, ...]``.

    Raises:
        TypeError, ValueError: ``name: expected ..., got ...``.
    """
    known = KNOWN.get(name)
    if known is None:
        return x
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected torch.Tensor {known.shape}, got {type(x).__name__}")
    fits = {
        "float": x.dtype.is_floating_point,
        "integer": x.dtype in (torch.int32, torch.int64),
        "bool": x.dtype == torch.bool,
    }
    if not fits[known.kind]:
        raise TypeError(f"{name}: expected {known.kind} {known.shape}, got {str(x.dtype).removeprefix('torch.')}")
    if known.per == "token" and shape is not None and tuple(x.shape[:2]) == shape:
        x = x.flatten(0, 1)
    size = tokens if known.per == "token" else rows
    if x.dim() != 1 + len(known.axes) or x.shape[0] != size:
        expected = [str(size), *known.axes]
        raise ValueError(f"{name}: expected {known.kind} [{', '.join(expected)}], got {list(x.shape)}")
    return x
