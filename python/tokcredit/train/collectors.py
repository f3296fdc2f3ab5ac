"""Inputs and loss variables that forward passes give: log-probs, entropies, divergences, group statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tokcredit import inputs, ops
from tokcredit.blocks import divergence, log_probs
from tokcredit.blocks.head import Head
from tokcredit.methods.align_distil import inverse_extrapolation, teacher_distance
from tokcredit.packing import TreePack
from tokcredit.packing.output_layer import OutputLayer, output_layer
from tokcredit.packing.predictions import Predicted, gather, scores
from tokcredit.rollouts import Rollouts
from tokcredit.supervised import Divergence
from tokcredit.train import activations, adapter, virtual_tokens
from tokcredit.train.critic import Critic
from tokcredit.train.scoring import plan, predict

FROM_TEACHER = frozenset({"reverse_kl", "forward_kl", "js"})
"""Divergences from the teacher."""

LEARNED = frozenset({"reward_masks", "divergence_masks"})
"""Variables that networks of their own give, from hidden states of the reference policy."""

_DIVERGENCES = FROM_TEACHER | {"ref_forward_kl"}
_OF_LOGITS = _DIVERGENCES | {
    "teacher_top_ids",
    "teacher_top_log_probs",
    "squared_probs",
    "token_probs",
    "disagreement",
    "padded_disagreement",
}


class ForwardPass:
    """Forward passes over some rows.

    Every property is one input or one variable of an objective, under its name, and is computed when it is first read.
    Values are float ``[N, ...]`` in the packed order of the batch.

    Args:
        names: Which properties will be read; this decides what the models return.
        batch: Packed rows with ``prompt_tokens``; tokens that they share are computed once.
        policy: Causal language model, the policy.
        reference: Reference policy, or None.
        teacher: Model of the teacher, or None. It sees ``teacher_prompt_tokens`` if the batch has them.
        temperature: Logits of all models are divided by it.
        token_loss: Token loss of the objective, which says how its divergence is taken, or None.
        hidden_only: Whether the loss takes hidden states where it can, so that divergences are not read.
        masks: Networks of :data:`LEARNED` by name, or None.
        critic: Critic, or None.
        aligned: Aligned policy, or None.
        reverse_teacher: Model that the teacher is extrapolated away from, or None.
        extrapolation: Stage of the objective that makes one teacher of both, or None.
        top_k: Number of most likely tokens of the teacher that are read.
    """

    def __init__(
        self,
        names: Collection[str],
        batch: Rollouts,
        policy: Any,
        reference: Any = None,
        teacher: Any = None,
        temperature: float = 1.0,
        token_loss: Any = None,
        hidden_only: bool = False,
        masks: Any = None,
        *,
        critic: Critic | None = None,
        aligned: Any = None,
        reverse_teacher: Any = None,
        extrapolation: inverse_extrapolation | None = None,
        top_k: int = 0,
    ) -> None:
        self._names, self._batch, self._temperature = frozenset(names), batch, temperature
        self._token_loss, self._hidden_only, self._masks = token_loss, hidden_only, masks
        self._policy, self._reference, self._teacher = policy, reference, teacher
        self._critic, self._aligned = critic, aligned
        self._reverse_teacher, self._extrapolation, self._top_k = reverse_teacher, extrapolation, top_k

    @cached_property
    def layer(self) -> OutputLayer | None:
        """Output layer of the policy, or None if something that is read needs the logits."""
        if self.distils_hidden:
            return self._compared_layers[0]
        return None if self._names & _OF_LOGITS else output_layer(self._policy)

    @cached_property
    def distils_hidden(self) -> bool:
        """Whether the loss is that of hidden states of the policy and the teacher, :attr:`teacher_states`."""
        models = (self._policy, self._teacher)
        of_one = self._extrapolation is None and not self._batch.has_input("teacher_top_ids")
        divergent = self._hidden_only and isinstance(self._token_loss, Divergence) and of_one
        return divergent and all(output_layer(model) is not None for model in models)

    @property
    def _compared_layers(self) -> list[OutputLayer]:
        """Output layers of the policy and the teacher, without the padding by which one has more ids."""
        layers = [layer for model in (self._policy, self._teacher) if (layer := output_layer(model)) is not None]
        ids = min(layer.weight.shape[0] for layer in layers)
        return [layer._replace(settings={**layer.settings, "vocabulary": ids}) for layer in layers]

    @property
    def teacher_states(self) -> tuple[Tensor, Head]:
        """Final hidden states of the teacher that predict the tokens, ``[N, d']``, and its output layer."""
        layer = self._compared_layers[1]
        packed = self._plan_of(self._teacher, self._taught)
        with torch.no_grad():
            predicted = predict(self._teacher, packed)
            assert predicted.hidden_states is not None
            hidden = self._of_rows(predicted.hidden_states, packed)
        return hidden, Head(layer.weight.detach(), layer.bias, **layer.settings)

    @cached_property
    def _plan(self) -> TreePack:
        return self._planned(self._batch)

    def _planned(self, batch: Rollouts) -> TreePack:
        # Whole distributions and hidden states are given at every token, log-probs where the policy chose it.
        whole = self._names & (_OF_LOGITS | {"hidden_states"})
        return plan(batch, torch.ones_like(batch.response_mask) if whole else None)

    def _plan_of(self, model: Any, batch: Rollouts) -> TreePack:
        """Return the plan of the prompts that another model sees; that of the policy if they are the same."""
        prompts = virtual_tokens.known(model, batch.input("prompt_tokens"))
        if batch is self._batch and prompts.equal(batch.input("prompt_tokens")):
            return self._plan
        return self._planned(batch.with_inputs(prompt_tokens=prompts))

    @cached_property
    def _predicted(self) -> Predicted:
        apart = self.layer is not None
        shared = "values" in self._names and self._critic is not None and self._critic.model is None
        wanted = apart or shared or "hidden_states" in self._names
        return predict(self._policy, self._plan, hidden_states=wanted, logits=not apart)

    def _to_rows(self, x: Tensor, packed: TreePack) -> Tensor:
        return torch.where(self._batch.response_mask, packed.to_rows(x), 0)

    def _scores_of(self, model: Any, packed: TreePack, predicted: Predicted, overwrite: bool) -> tuple[Tensor, Tensor]:
        layer = None if predicted.logits is not None else output_layer(model)
        found = scores(predicted, packed.target, layer, self._temperature, overwrite)
        return self._to_rows(found[0], packed), self._to_rows(found[1], packed)

    def _log_probs_of(self, model: Any, batch: Rollouts) -> Tensor:
        """Return the log-probs of the tokens under another model."""
        layer, packed = output_layer(model), self._plan_of(model, batch)
        predicted = predict(model, packed, hidden_states=layer is not None, logits=layer is None)
        return self._scores_of(model, packed, predicted, overwrite=True)[0]

    @cached_property
    def _scores(self) -> tuple[Tensor, Tensor]:
        # A divergence reads the logits again in its backward pass.
        return self._scores_of(self._policy, self._plan, self._predicted, not self._names & _DIVERGENCES)

    @property
    def shares_predictions(self) -> bool:
        """Whether rows share so many predictions that the output layer is best computed once for each."""
        return 4 * self._plan.num_predictions < 3 * self._plan.num_wanted

    @property
    def final_hidden_states(self) -> Tensor:
        """Final hidden states that predict the tokens, ``[N, d]``, in the dtype of the model and with gradient."""
        assert self._predicted.hidden_states is not None
        return self._of_rows(self._predicted.hidden_states, self._plan)

    def _of_rows(self, x: Tensor, packed: TreePack) -> Tensor:
        """Return rows of a matrix at the tokens; at a token that is not wanted, which nothing reads, any of them."""
        return gather(x, packed.index.clamp(min=0)) if x.shape[0] else x.new_zeros(self._batch.num_tokens, x.shape[1])

    @property
    def _logits(self) -> Tensor:
        assert self._predicted.logits is not None
        return self._predicted.logits

    @cached_property
    def _scaled_logits(self) -> Tensor:
        return self._of_rows(self._logits, self._plan).float() / self._temperature

    @property
    def _taught(self) -> Rollouts:
        """The batch with the prompts that the teacher sees."""
        if not self._batch.has_input("teacher_prompt_tokens"):
            return self._batch
        return self._batch.with_inputs(prompt_tokens=self._batch.input("teacher_prompt_tokens"))

    def _logits_of(self, model: Any, packed: TreePack) -> Tensor:
        """Return the logits of another model, without gradient."""
        with torch.no_grad():
            predicted = predict(model, packed, hidden_states=False, logits=True)
        assert predicted.logits is not None
        return predicted.logits

    def _compared(self, between: Callable[..., Tensor], others: Sequence[Tensor], packed: TreePack) -> Tensor:
        """Return what a function of the logits of the policy and of other models gives at the tokens."""
        own, *others = _of_same_ids(self._logits, *others)
        if packed is self._plan:
            return packed.to_rows(between(own, *others, temperature=self._temperature))
        own, others = self._of_rows(own, self._plan), [self._of_rows(x, packed) for x in others]
        return between(own, *others, temperature=self._temperature)

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
        return self._to_rows(log_probs.squared_probs(self._logits, self._plan.target, self._temperature), self._plan)

    @property
    def hidden_states(self) -> Tensor:
        """Final hidden states that predict the tokens, ``[N, d]``."""
        return self.final_hidden_states.float()

    @property
    def ref_log_probs(self) -> Tensor:
        """Log-probs under the reference policy, nats."""
        with adapter.switched_off(self._reference):
            return self._log_probs_of(self._reference, self._batch)

    @property
    def aligned_log_probs(self) -> Tensor:
        """Log-probs of the tokens under the aligned policy, nats, without gradient."""
        with torch.no_grad():
            return self._log_probs_of(self._aligned, self._batch)

    @cached_property
    def values(self) -> Tensor:
        """Values of the critic before the tokens, with gradient; 0 where the policy did not choose the token."""
        assert self._critic is not None
        packed, hidden = self._plan, None
        if self._critic.model is None:
            hidden = self._predicted.hidden_states
        else:
            packed = self._plan_of(self._critic.model, self._batch)
            hidden = predict(self._critic.model, packed).hidden_states
        assert hidden is not None
        return self._to_rows(self._critic(hidden), packed)

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

    @property
    def teacher_log_probs(self) -> Tensor:
        """Log-probs of the tokens under the teacher, nats, without gradient."""
        with torch.no_grad():
            return self._log_probs_of(self._teacher, self._taught)

    @cached_property
    def _teacher_top(self) -> tuple[Tensor, Tensor]:
        """The most likely tokens of the teacher and their log-probs, ``[N, k]`` each."""
        packed = self._plan_of(self._teacher, self._taught)
        logits = self._logits_of(self._teacher, packed)[:, : vocabulary(self._policy)]
        found = (logits.float() / self._temperature).log_softmax(-1).topk(self._top_k)
        return self._of_rows(found.indices, packed), self._of_rows(found.values, packed)

    @property
    def teacher_top_ids(self) -> Tensor:
        """The most likely tokens of the teacher, int64 ``[N, k]``."""
        return self._teacher_top[0]

    @property
    def teacher_top_log_probs(self) -> Tensor:
        """Their log-probs, ``[N, k]``, nats."""
        return self._teacher_top[1]

    @cached_property
    def _teacher_logits(self) -> tuple[list[Tensor], TreePack]:
        """Logits of the teacher, and of the reverse teacher if there is one, and the plan of both."""
        packed = self._plan_of(self._teacher, self._taught)
        models = [x for x in (self._teacher, self._reverse_teacher) if x is not None]
        return [self._logits_of(model, packed) for model in models], packed

    @property
    def teacher_distance(self) -> Tensor:
        """Distance of the two teachers at the tokens, from 0 to 2."""
        logits, packed = self._teacher_logits
        first, other = _of_same_ids(*logits)
        return self._to_rows(teacher_distance(first, other, self._temperature), packed)

    def _from_teacher(self, kind: str) -> Tensor:
        own = isinstance(self._token_loss, Divergence) and self._token_loss.variable == kind
        if own and self._batch.has_input("teacher_top_ids"):
            return self._from_top()
        logits, packed = self._teacher_logits
        between = self._token_loss if own else partial(divergence.between, kind=kind)
        if (extrapolation := self._extrapolation) is None:
            return self._compared(between, logits[:1], packed)

        def beyond(student: Tensor, first: Tensor, other: Tensor, temperature: float) -> Tensor:
            found: Tensor = between(student, extrapolation.teacher(first, other, temperature), temperature=temperature)
            return found

        return self._compared(beyond, logits, packed)

    def _from_top(self) -> Tensor:
        """Return the divergence of the token loss from the teacher whose most likely tokens the batch has."""
        loss, batch = self._token_loss, self._batch
        top = divergence.Top(batch.input("teacher_top_ids"), batch.input("teacher_top_log_probs"), loss.outside)
        between: Divergence = dataclasses.replace(loss, top_k=None)
        return between(self._of_rows(self._logits, self._plan), top, self._temperature, batch.response_mask)

    @cached_property
    def reverse_kl(self) -> Tensor:
        """``KL(policy || teacher)`` of the next-token distributions, nats, with gradient to the policy."""
        return self._from_teacher("reverse_kl")

    @cached_property
    def forward_kl(self) -> Tensor:
        """``KL(teacher || policy)`` of the next-token distributions, nats, with gradient to the policy."""
        return self._from_teacher("forward_kl")

    @cached_property
    def js(self) -> Tensor:
        """Jensen-Shannon divergence of policy and teacher, nats, with gradient to the policy."""
        return self._from_teacher("js")

    @cached_property
    def ref_forward_kl(self) -> Tensor:
        """``KL(reference || policy)`` of the next-token distributions, nats, with gradient to the policy."""
        logits, _, packed = self._of_reference
        return self._compared(partial(divergence.between, kind="forward_kl"), [logits], packed)

    @cached_property
    def _of_reference(self) -> tuple[Tensor, list[Tensor], TreePack]:
        """Logits of the reference policy, its hidden states after each layer if masks are read, and its plan."""
        with adapter.switched_off(self._reference):
            packed = self._plan_of(self._reference, self._batch)
            if self._names & LEARNED:
                return *activations.layers(self._reference, packed), packed
            return self._logits_of(self._reference, packed), [], packed

    def _mask(self, name: str) -> Tensor:
        _, states, packed = self._of_reference
        found: Tensor = self._masks[name]([self._of_rows(x, packed) for x in states])
        return torch.where(self._batch.response_mask, found.float(), 0)

    @property
    def reward_masks(self) -> Tensor:
        """Learned factors of the log-ratios, at least 0, with gradient to their network."""
        return self._mask("reward_masks")

    @property
    def divergence_masks(self) -> Tensor:
        """Learned factors of the divergences, likewise."""
        return self._mask("divergence_masks")

    @property
    def prompt_attention(self) -> Tensor:
        """Attention of the tokens to the prompt in the last layer of the policy, from 0 to 1, without gradient."""
        return activations.attention_to_prompt(self._policy, self._batch)

    def read(self, name: str) -> Tensor:
        """Return an input or a variable by name.

        Args:
            name: Name of a property.
        """
        value: Tensor = getattr(self, name)
        return value


_COLLECTORS = ("policy", "policy_groups", "reference", "teacher", "teachers", "critic", "aligned")


def collected() -> frozenset[str]:
    """Return the names of the registered inputs whose collector is a forward pass."""
    return frozenset().union(*map(inputs.names, _COLLECTORS))


def vocabulary(model: Any) -> int:
    """Return the number of ids of a model, with those that pad its output layer.

    Args:
        model: Causal language model.
    """
    ids: int = model.config.get_text_config().vocab_size
    return ids


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
    *,
    critic: Critic | None = None,
    aligned: Any = None,
    reverse_teacher: Any = None,
    top_k: int = 0,
) -> Rollouts:
    """Return the batch with those of the required inputs that forward passes give.

    The ``old_log_probs`` of replayed rows are their ``rollout_log_probs``, because an older policy sampled them.

    Args:
        required_inputs: Names of inputs; those with other collectors are left out.
        batch: Whole groups, packed, with ``prompt_tokens``.
        size: Largest number of rows of a forward pass, except for inputs that need a whole group at once.
        policy: The policy before the update. Of the teacher's most likely tokens it must have all.
        reference: Reference policy, for ``ref_log_probs`` and ``ref_forward_kl``.
        teacher: Model of the teacher, for its log-probs and the divergences from it.
        temperature: Logits of all models are divided by it.
        critic: Critic, for ``values``.
        aligned: Aligned policy, for ``aligned_log_probs``.
        reverse_teacher: Second teacher, for ``teacher_distance``.
        top_k: Number of tokens in ``teacher_top_ids``.
    """
    names = frozenset(required_inputs) & collected()
    if batch.num_tokens == 0:  # of a process that has no row of a step
        return batch.with_inputs(**{name: _nothing(name, batch, policy) for name in names})
    if not names:
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
        further = {"critic": critic, "aligned": aligned, "reverse_teacher": reverse_teacher, "top_k": top_k}
        forward = ForwardPass(names, batch.take(chosen), policy, reference, teacher, temperature, **further)
        for name in names:
            values[name].append(forward.read(name))
    back = torch.cat(places).argsort()
    whole = {name: _joined(parts)[back] for name, parts in values.items()}
    if "old_log_probs" in whole and batch.has_input("replayed"):
        replayed = ops.spread(batch.input("replayed"), batch.all_spans)
        whole["old_log_probs"] = torch.where(replayed, batch.input("rollout_log_probs"), whole["old_log_probs"])
    return batch.with_inputs(**whole)


_DTYPES = {"float": torch.float32, "integer": torch.int64, "bool": torch.bool}


def _nothing(name: str, batch: Rollouts, policy: Any) -> Tensor:
    """Return an input of a batch without tokens."""
    entry = inputs.get(name)
    size = 0 if entry.per == "token" else batch.num_rows
    width = policy.config.get_text_config().hidden_size if name == "hidden_states" else 1
    return torch.zeros(size, *(width for _ in entry.axes), dtype=_DTYPES[entry.dtype], device=batch.device)


def _of_same_ids(*logits: Tensor) -> list[Tensor]:
    """Return logits of the ids that all models have; output layers may be padded to different numbers of them."""
    ids = min(x.shape[1] for x in logits)
    return [x if x.shape[1] == ids else x[:, :ids] for x in logits]


def _joined(values: list[Tensor]) -> Tensor:
    """Return tensors one after another; a second axis is padded with 0 to the widest."""
    if values[0].dim() == 2:
        width = max(value.shape[1] for value in values)
        values = [torch.nn.functional.pad(value, (0, width - value.shape[1])) for value in values]
    return torch.cat(values)
