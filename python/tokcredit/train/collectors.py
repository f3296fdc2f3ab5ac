"""Inputs and loss variables that forward passes give: log-probs, entropies, divergences, group statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokcredit import inputs, ops
from tokcredit.blocks import divergence, log_probs
from tokcredit.rollouts import Rollouts
from tokcredit.train import adapter
from tokcredit.train.output_layer import OutputLayer, output_layer
from tokcredit.train.scoring import Predicted, predict, score, scores_of

_OF_LOGITS = frozenset(
    {"squared_probs", "token_probs", "disagreement", "padded_disagreement", "reverse_kl", "forward_kl"}
)


class ForwardPass:
    """Forward passes over some rows.

    Every property is one input or one variable of an objective, under its name, and is computed when it is first read.
    Values are float ``[N, ...]`` in the packed order of the batch.

    Args:
        names: Which properties will be read; this decides what the models return.
        batch: Packed rows with ``prompt_tokens``; see :func:`~tokcredit.train.scoring.predict`.
        policy: Causal language model, the policy.
        reference: Reference policy, or None.
        teacher: Teacher, or None.
        temperature: Logits of all models are divided by it.
    """

    def __init__(
        self,
        names: Collection[str],
        batch: Rollouts,
        policy: Any,
        reference: Any = None,
        teacher: Any = None,
        temperature: float = 1.0,
    ) -> None:
        self._names, self._batch, self._temperature = frozenset(names), batch, temperature
        self._policy, self._reference, self._teacher = policy, reference, teacher

    @cached_property
    def layer(self) -> OutputLayer | None:
        """Output layer of the policy, or None if something that is read needs the logits."""
        return None if self._names & _OF_LOGITS else output_layer(self._policy)

    @cached_property
    def _predicted(self) -> Predicted:
        apart = self.layer is not None
        wanted = apart or "hidden_states" in self._names
        return predict(self._policy, self._batch, hidden_states=wanted, logits=not apart)

    @cached_property
    def _scores(self) -> tuple[Tensor, Tensor]:
        # A divergence reads the logits again in its backward pass.
        overwrite = not self._names & inputs.names("teacher")
        return scores_of(self._predicted, self.layer, self._temperature, overwrite)

    @property
    def final_hidden_states(self) -> Tensor:
        """Final hidden states that predict the tokens, ``[N, d]``, in the dtype of the model and with gradient."""
        assert self._predicted.hidden_states is not None
        return self._predicted.hidden_states[self._predicted.inside]

    @property
    def _all_logits(self) -> Tensor:
        assert self._predicted.logits is not None
        return self._predicted.logits

    @property
    def _logits(self) -> Tensor:
        return self._all_logits[self._predicted.inside]

    @cached_property
    def _scaled_logits(self) -> Tensor:
        return self._logits.float() / self._temperature

    @cached_property
    def _teacher_logits(self) -> Tensor:
        with torch.no_grad():
            predicted = predict(self._teacher, self._batch)
        assert predicted.logits is not None
        return predicted.logits[predicted.inside]

    @property
    def log_probs(self) -> Tensor:
        """Log-probs of the tokens under the policy, nats, with gradient; 0 where it did not choose the token."""
        return self._scores[0]

    @property
    def old_log_probs(self) -> Tensor:
        """The same numbers, as an input: the policy here is the one that the update starts from."""
        return self._scores[0]

    @property
    def entropies(self) -> Tensor:
        """Entropies of the next-token distributions, nats, with gradient."""
        return self._scores[1]

    @property
    def squared_probs(self) -> Tensor:
        """Sums over the vocabulary of squared probabilities."""
        seen = self._predicted
        return log_probs.squared_probs(self._all_logits, seen.tokens, self._temperature)[seen.inside]

    @property
    def hidden_states(self) -> Tensor:
        """Final hidden states that predict the tokens, ``[N, d]``."""
        return self.final_hidden_states.float()

    @property
    def ref_log_probs(self) -> Tensor:
        """Log-probs under the reference policy, nats."""
        with adapter.switched_off(self._reference):
            return score(self._reference, self._batch, self._temperature)[0]

    @property
    def token_probs(self) -> Tensor:
        """Probabilities of the K tokens that the rows of the group chose, ``[N, K]``."""
        return log_probs.group_probs(self._scaled_logits, self._batch)

    @property
    def disagreement(self) -> Tensor:
        """Disagreement of the rows of the group at each position, from 0 to 1."""
        return divergence.disagreement(self._scaled_logits, self._batch)

    @property
    def padded_disagreement(self) -> Tensor:
        """The same, with uniform distributions at padding."""
        return divergence.disagreement(self._scaled_logits, self._batch, padded=True)

    def _from_teacher(self, kind: str) -> Tensor:
        return divergence.between(self._logits, self._teacher_logits, kind, temperature=self._temperature)

    @cached_property
    def reverse_kl(self) -> Tensor:
        """``KL(policy || teacher)`` of the next-token distributions, nats, with gradient to the policy."""
        return self._from_teacher("reverse_kl")

    @cached_property
    def forward_kl(self) -> Tensor:
        """``KL(teacher || policy)`` of the next-token distributions, nats, with gradient to the policy."""
        return self._from_teacher("forward_kl")

    def read(self, name: str) -> Tensor:
        """Return an input or a variable by name.

        Args:
            name: Name of a property.
        """
        value: Tensor = getattr(self, name)
        return value


_COLLECTORS = ("policy", "policy_groups", "reference", "teacher")


def collected() -> frozenset[str]:
    """Return the names of the registered inputs whose collector is a forward pass."""
    return frozenset().union(*map(inputs.names, _COLLECTORS))


def computes(name: str) -> bool:
    """Return whether a forward pass computes an input or a variable.

    Args:
        name: Name of an input or a variable.
    """
    return not name.startswith("_") and isinstance(getattr(ForwardPass, name, None), property | cached_property)


@torch.no_grad()
def collect(
    required_inputs: Iterable[str],
    batch: Rollouts,
    size: int,
    policy: Any,
    reference: Any = None,
    teacher: Any = None,
    temperature: float = 1.0,
) -> Rollouts:
    """Return the batch with those of the required inputs that forward passes give.

    The ``old_log_probs`` of replayed rows are their ``rollout_log_probs``, because an older policy sampled them.

    Args:
        required_inputs: Names of inputs; those with other collectors are left out.
        batch: Whole groups, packed, with ``prompt_tokens``.
        size: Largest number of rows of a forward pass, except for inputs that need a whole group at once.
        policy: The policy before the update.
        reference: Reference policy, for ``ref_log_probs``.
        teacher: Teacher, for the divergences from it.
        temperature: Logits of all models are divided by it.
    """
    names = frozenset(required_inputs) & collected()
    if not names or batch.num_tokens == 0:
        return batch
    order = batch.group_index.argsort(stable=True)
    order = order[(batch.end > batch.begin)[order]]
    groups = batch.group_index[order].unique_consecutive(return_counts=True)[1]
    parts = order.split(groups.tolist() if names & inputs.names("policy_groups") else size)
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    places = []
    for rows in parts:
        chosen = batch.selection(rows)
        assert chosen.tokens is not None
        places.append(chosen.tokens)
        forward = ForwardPass(names, batch.take(chosen), policy, reference, teacher, temperature)
        for name in names:
            values[name].append(forward.read(name))
    back = torch.cat(places).argsort()
    whole = {name: _joined(parts)[back] for name, parts in values.items()}
    if "old_log_probs" in whole and batch.has_input("replayed"):
        replayed = ops.spread(batch.input("replayed"), batch.all_spans)
        whole["old_log_probs"] = torch.where(replayed, batch.input("rollout_log_probs"), whole["old_log_probs"])
    return batch.with_inputs(**whole)


def _joined(values: list[Tensor]) -> Tensor:
    """Return tensors one after another; a second axis is padded with 0 to the widest."""
    if values[0].dim() == 2:
        width = max(value.shape[1] for value in values)
        values = [torch.nn.functional.pad(value, (0, width - value.shape[1])) for value in values]
    return torch.cat(values)
