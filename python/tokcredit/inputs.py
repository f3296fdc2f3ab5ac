"""The registry of inputs: everything that a batch may carry beside tokens, groups and rewards.

One entry owns the name, shape, dtype, meaning and collector of an input. Batches, stages, the trainer, the adapters and
the documentation read their lists of names from here. A stage of your own that reads a new input registers it first::

    tokcredit.inputs.register("difficulty", per="row", dtype="float", meaning="share of failed attempts at the prompt")
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokcredit.arguments import INTEGERS, describe

Dtype = Literal["float", "integer", "bool"]
Per = Literal["token", "row"]


@dataclass(frozen=True)
class Input:
    """An input by name.

    Attributes:
        name: Name in ``Rollouts`` and in the ``required_inputs`` of stages.
        per: ``"token"`` for ``[N, ...]``, or the batch's ``(B, T, ...)``; ``"row"`` for ``[R, ...]``.
        dtype: Kind of dtype.
        meaning: One line for the documentation, with the unit.
        collector: How the trainer obtains it; see :data:`COLLECTORS`.
        axes: Names of further axes.
        nan_means_absent: Whether NaN marks tokens without a value.
        of_trajectory: Which row of a trajectory has the number of the trajectory, for an input per row: ``"equal"`` if
            all rows must have the same, ``"first"``, or ``"last"``, whose earlier rows have the same or 0.
    """

    name: str
    per: Per
    dtype: Dtype
    meaning: str
    collector: str = "user"
    axes: tuple[str, ...] = ()
    nan_means_absent: bool = False
    of_trajectory: Literal["equal", "first", "last"] = "equal"

    @property
    def shape(self) -> str:
        """Shape as documentation writes it, for example ``[N, d]``."""
        return f"[{', '.join(('N' if self.per == 'token' else 'R', *self.axes))}]"

    def check(self, x: Any, tokens: int, rows: int, shape: tuple[int, int] | None, device: torch.device) -> Tensor:
        """Return ``x`` with its tokens on one axis, after checking type, dtype, shape and device.

        Args:
            x: What the batch carries.
            tokens: Number of tokens N of the batch.
            rows: Number of rows R.
            shape: ``(B, T)`` of a padded batch, or None.
            device: Device of the batch.

        Raises:
            TypeError: It is not a tensor, or has another dtype.
            ValueError: Its shape or device is wrong.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.name}: expected torch.Tensor {self.shape}, got {type(x).__name__}")
        if self.dtype == "float":
            fits = x.dtype.is_floating_point
        else:
            fits = x.dtype in (INTEGERS if self.dtype == "integer" else (torch.bool,))
        if not fits:
            raise TypeError(f"{self.name}: expected {self.dtype} {self.shape}, got {describe(x)}")
        flat = x
        padded = self.per == "token" and shape is not None and x.dim() == 2 + len(self.axes)
        if padded and tuple(x.shape[:2]) == shape:
            flat = x.flatten(0, 1)
        size = tokens if self.per == "token" else rows
        if flat.dim() != 1 + len(self.axes) or flat.shape[0] != size:
            expected = ", ".join([str(size), *self.axes])
            raise ValueError(f"{self.name}: expected {self.dtype} [{expected}], got {describe(x)}")
        if flat.device != device:
            raise ValueError(f"{self.name}: expected a tensor on {device}, got one on {flat.device}")
        return flat


COLLECTORS = {
    "policy": "a forward pass of the policy before the update, row by row",
    "policy_groups": "a forward pass of the policy before the update, whole groups at once",
    "reference": "a forward pass of the reference model",
    "teacher": "forward passes of the policy and of a teacher",
    "teachers": "forward passes of two teachers",
    "told": "the trainer, which tells the teacher an answer or another attempt",
    "sampler": "the engine that samples",
    "continuations": "continuations sampled from inside a row",
    "probes": "short answers sampled after every step of a row",
    "tree_sampler": "a sampler that branches inside a reply",
    "replay": "the replay buffer",
    "environment": "the task, or the tools it offers",
    "length_head": "a value head that predicts remaining tokens",
    "critic": "a forward pass of the critic",
    "credit": "the credit stage, from the values of the critic",
    "aligned": "a forward pass of a policy that was trained on preferences",
    "reward_model": "forward passes of a reward model that learns from outcomes, and of its first weights",
    "greedy": "a greedy response to each prompt",
    "turn_answers": "forward passes of the policy over the true answer, after the prompt and every turn but the last",
    "ref_turn_answers": "the same of the reference model",
    "roles": "running means of the rewards of roles",
    "contrasted": "forward passes of a positive and a negative model, over pairs",
    "revised_prompts": "forward passes of the reference model under two other prompts, over pairs",
    "activations": "activations of the reference model, over pairs",
    "response_text": "the text of the response, of pairs",
    "instructions": "the trainer, which adds instructions to the prompts of pairs",
    "host": "another trainer, or the file that a trainer wrote",
    "user": "whoever makes the batch",
}
"""Every collector, and what it does."""

_REGISTRY: dict[str, Input] = {}


def register(
    name: str,
    *,
    per: Per,
    dtype: Dtype,
    meaning: str,
    collector: str = "user",
    axes: tuple[str, ...] = (),
    nan_means_absent: bool = False,
    of_trajectory: Literal["equal", "first", "last"] = "equal",
) -> Input:
    """Add an input to the registry and return its entry. Registering the same entry again changes nothing.

    Args:
        name: A new name, a Python identifier.
        per: ``"token"`` or ``"row"``.
        dtype: ``"float"``, ``"integer"`` or ``"bool"``.
        meaning: One line for the documentation.
        collector: How the trainer obtains it, one of :data:`COLLECTORS`.
        axes: Names of further axes.
        nan_means_absent: Whether NaN marks tokens without a value.
        of_trajectory: For an input per row, ``"equal"``, ``"first"`` or ``"last"``; see :class:`Input`.

    Raises:
        ValueError: The name is taken by another entry, or an argument is not one of its allowed values.
    """
    if not name.isidentifier():
        raise ValueError(f"name: expected a Python identifier, got {name!r}")
    for argument, value, allowed in (
        ("per", per, ("token", "row")),
        ("dtype", dtype, ("float", "integer", "bool")),
        ("collector", collector, tuple(COLLECTORS)),
        ("of_trajectory", of_trajectory, ("equal", "first", "last")),
    ):
        if value not in allowed:
            raise ValueError(f"{argument}: expected one of {', '.join(allowed)}, got {value!r}")
    entry = Input(name, per, dtype, meaning, collector, tuple(axes), nan_means_absent, of_trajectory)
    if _REGISTRY.get(name, entry) != entry:
        raise ValueError(f"name: expected a new name, got {name!r}, which is {_REGISTRY[name].meaning}")
    _REGISTRY[name] = entry
    return entry


def get(name: str) -> Input:
    """Return the entry of an input.

    Args:
        name: Name of a registered input.

    Raises:
        ValueError: No such input; the message suggests the nearest name.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f"did you mean {near[0]}?" if near else "register it with tokcredit.inputs.register"
        raise ValueError(f"input: expected a registered name, got {name!r}; {hint}")
    return _REGISTRY[name]


def names(collector: str | None = None) -> frozenset[str]:
    """Return the names of all inputs, or of those with one collector.

    Args:
        collector: One of :data:`COLLECTORS`, or None for all.
    """
    return frozenset(entry.name for entry in _REGISTRY.values() if collector in (None, entry.collector))


for _entry in (
    Input("old_log_probs", "token", "float", "log-probs under the policy that the update starts from, nats", "policy"),
    Input("rollout_log_probs", "token", "float", "log-probs under the engine that sampled, nats", "sampler"),
    Input("ref_log_probs", "token", "float", "log-probs under the reference policy, nats", "reference"),
    Input("entropies", "token", "float", "entropy of the next-token distribution, nats", "policy"),
    Input(
        "squared_probs",
        "token",
        "float",
        "sum over the vocabulary of squared probabilities of the distribution of old_log_probs",
        "policy",
    ),
    Input("reverse_kl", "token", "float", "KL(policy || teacher) of the next-token distributions, nats", "teacher"),
    Input("forward_kl", "token", "float", "KL(teacher || policy) of the next-token distributions, nats", "teacher"),
    Input("teacher_log_probs", "token", "float", "log-probs under the teacher, nats", "teacher"),
    Input("teacher_top_ids", "token", "integer", "most likely tokens of the teacher", "teacher", ("k",)),
    Input("teacher_top_log_probs", "token", "float", "log-probs of teacher_top_ids, nats", "teacher", ("k",)),
    Input("teacher_mask", "row", "bool", "True for a row whose teacher was told more than its prompt", "told"),
    Input(
        "ref_forward_kl", "token", "float", "KL(reference || policy) of the next-token distributions, nats", "reference"
    ),
    Input(
        "disagreement",
        "token",
        "float",
        "how much the rows of the group disagree at this position, 0 to 1 (divergence.disagreement)",
        "policy_groups",
    ),
    Input(
        "padded_disagreement",
        "token",
        "float",
        "how much the rows of the group disagree at this position, with uniform distributions at padding, 0 to 1",
        "policy_groups",
    ),
    Input("hidden_states", "token", "float", "final hidden state that predicts the token", "policy", ("d",)),
    Input(
        "token_probs",
        "token",
        "float",
        "probabilities of the distinct tokens of the group, padded to K columns (log_probs.group_probs)",
        "policy_groups",
        ("K",),
    ),
    Input(
        "state_values",
        "token",
        "float",
        "mean reward of continuations from before the token; NaN at tokens without continuations",
        "continuations",
        nan_means_absent=True,
    ),
    Input(
        "step_values",
        "token",
        "float",
        "mean reward of continuations from the first token of every reasoning step; NaN at other tokens",
        "continuations",
        nan_means_absent=True,
    ),
    Input(
        "node_ids",
        "row",
        "integer",
        "id of the tree node that the row leads to; rows are edges of a tree",
        "tree_sampler",
    ),
    Input(
        "parent_ids",
        "row",
        "integer",
        "id of the tree node that the row starts from; any id that is no node's if it starts from the prompt",
        "tree_sampler",
    ),
    Input(
        "answer_probs",
        "token",
        "float",
        "mean probability of the true answer's tokens after a step; NaN at tokens that do not end a step",
        "probes",
        nan_means_absent=True,
    ),
    Input(
        "answer_confidences",
        "token",
        "float",
        "mean of exp(-mean entropy) over probed answers; NaN at tokens that do not end a step",
        "probes",
        nan_means_absent=True,
    ),
    Input(
        "token_rewards",
        "token",
        "float",
        "reward of a token that the policy chose, of a turn at its last token; 0 elsewhere",
        "environment",
    ),
    Input(
        "turn_ids",
        "token",
        "integer",
        "number of the turn in its trajectory, ascending; read at tokens that the policy chose",
        "environment",
    ),
    Input(
        "values",
        "token",
        "float",
        "value of the state before the token, as a critic predicts the rewards from there on",
        "critic",
    ),
    Input("value_targets", "token", "float", "what a critic is trained to predict before the token", "credit"),
    Input(
        "bootstrap_values",
        "row",
        "float",
        "value after the last token of a trajectory that was cut, 0 if it ended",
        "user",
        of_trajectory="last",
    ),
    Input(
        "context_keys",
        "row",
        "integer",
        "key of all tokens that the policy had seen before the row (tree.context_keys)",
        "sampler",
        of_trajectory="first",
    ),
    Input("role_ids", "row", "integer", "role of the policy in the trajectory, such as the player of a game", "user"),
    Input(
        "role_baselines",
        "row",
        "float",
        "running mean reward of the role before the trajectory (methods.rae.RoleBaselines)",
        "roles",
    ),
    Input(
        "greedy_rewards",
        "row",
        "float",
        "total reward of a greedy response to the same prompt, which is no row of the batch",
        "greedy",
    ),
    Input(
        "anchor_ids",
        "token",
        "integer",
        "state that the environment was in before a turn, at the turn's first token; equal ids are compared in a group",
        "environment",
    ),
    Input(
        "turn_scores",
        "token",
        "float",
        "score of the state after a turn, at the turn's last token; NaN at other tokens, and where there is none",
        "environment",
        nan_means_absent=True,
    ),
    Input(
        "answer_log_probs",
        "token",
        "float",
        "mean log-prob of the true answer's tokens after a turn, at the turn's last token, nats; NaN elsewhere",
        "turn_answers",
        nan_means_absent=True,
    ),
    Input(
        "initial_answer_log_probs",
        "row",
        "float",
        "mean log-prob of the true answer's tokens after the prompt, nats",
        "turn_answers",
    ),
    Input(
        "ref_answer_log_probs",
        "token",
        "float",
        "answer_log_probs under the reference policy, nats; NaN elsewhere",
        "ref_turn_answers",
        nan_means_absent=True,
    ),
    Input(
        "ref_initial_answer_log_probs",
        "row",
        "float",
        "initial_answer_log_probs under the reference policy, nats",
        "ref_turn_answers",
    ),
    Input(
        "implicit_rewards",
        "token",
        "float",
        "log-prob of the token under an implicit reward model minus that under its reference, nats",
        "reward_model",
    ),
    Input("turn_rewards", "token", "float", "reward of a turn at its last token, 0 elsewhere", "environment"),
    Input("expert", "row", "bool", "True for a row that an expert wrote, which the policy did not sample", "user"),
    Input(
        "aligned_log_probs",
        "token",
        "float",
        "log-probs under an aligned policy, whose log-ratio to the reference policy is a token reward, nats",
        "aligned",
    ),
    Input(
        "better_log_probs",
        "token",
        "float",
        "log-probs under the reference policy asked for a better answer, nats",
        "revised_prompts",
    ),
    Input(
        "worse_log_probs",
        "token",
        "float",
        "log-probs under the reference policy asked for a worse answer, nats",
        "revised_prompts",
    ),
    Input(
        "contrastive_log_probs",
        "token",
        "float",
        "log-probs under a policy of right solutions, contrasted with one of wrong solutions, nats",
        "contrasted",
    ),
    Input(
        "reward_masks",
        "token",
        "float",
        "factor of the token's log-ratio in a preference score, at least 0",
        "activations",
    ),
    Input(
        "divergence_masks",
        "token",
        "float",
        "factor of the token's divergence in a preference score, at least 0",
        "user",
    ),
    Input(
        "prompt_attention",
        "token",
        "float",
        "share of the attention at the token's own position that goes to the prompt, mean over the heads of a layer",
        "policy",
    ),
    Input(
        "teacher_distance",
        "token",
        "float",
        "sum over the vocabulary of the absolute difference of the probabilities of two teachers, 0 to 2",
        "teachers",
    ),
    Input(
        "prompt_pairs",
        "row",
        "bool",
        "True for the rows of a pair that are one response under two prompts",
        "instructions",
    ),
    Input(
        "field_weights",
        "token",
        "float",
        "factor of a token of a field in a preference score (TAB-PO)",
        "response_text",
    ),
    Input("planning_tokens", "token", "bool", "True for a token of a planning phrase", "user"),
    Input("replayed", "row", "bool", "True for a row sampled at an earlier step, by an older policy", "replay"),
    Input(
        "truncated",
        "row",
        "bool",
        "True for a row cut at the length limit, not ended by the policy",
        "sampler",
        of_trajectory="last",
    ),
    Input(
        "length_values",
        "token",
        "float",
        "-(1 - gamma^l), with l the remaining tokens predicted before the token",
        "length_head",
    ),
    Input("advantages", "token", "float", "advantage of the token, as a host passes it on", "host"),
    Input("weights", "token", "float", "factor of the token's loss, as a host passes it on", "host"),
    Input(
        "importance_sampling_ratio",
        "token",
        "float",
        "probability under the trainer over that under the engine, corrected by a host",
        "host",
    ),
    Input("recorded_advantages", "token", "float", "advantages that a trainer wrote into the file of a report", "host"),
    Input(
        "teacher_prompt_tokens",
        "row",
        "integer",
        "token ids of the prompt that the teacher sees, -1 on the left as padding",
        "told",
        ("P",),
        of_trajectory="first",
    ),
    Input(
        "prompt_tokens",
        "row",
        "integer",
        "token ids of the prompt, -1 on the left as padding",
        "sampler",
        ("P",),
        of_trajectory="first",
    ),
):
    _REGISTRY[_entry.name] = _entry
