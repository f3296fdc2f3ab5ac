"""Collectors of inputs of examples that do not change in training: what other models, prompts and texts give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from tokcredit import inputs
from tokcredit.methods.cdpo import contrastive_log_probs
from tokcredit.methods.sparse_po import activation_masks
from tokcredit.methods.tab_po import field_weights
from tokcredit.rollouts import Rollouts
from tokcredit.train import activations, adapter, collectors, models, virtual_tokens
from tokcredit.train.examples import Example, RevisedPrompts
from tokcredit.train.prompts import filled
from tokcredit.train.scoring import left_padded, plan, predict
from tokcredit.train.settings import CollectorSettings, Settings

_SETTINGS = {
    "contrasted": ("positive", "negative", "contrast"),
    "revised_prompts": ("better_template", "worse_template"),
    "activations": ("mask_activations",),
    "response_text": (),
    "instructions": ("instructions", "instructions_template"),
    "teachers": ("reverse_teacher",),
}
"""Settings that each collector reads."""
OF_EXAMPLES = tuple(name for name in _SETTINGS if name != "teachers")
"""Collectors that only training on examples has."""


def names() -> frozenset[str]:
    """Return the names of the inputs that do not change in training."""
    found = frozenset().union(*map(inputs.names, ("reference", "aligned", "teachers", *OF_EXAMPLES)))
    return frozenset(name for name in found if inputs.get(name).per == "token" and not inputs.get(name).axes)


def read(objective: Any, given: CollectorSettings) -> CollectorSettings:
    """Return the settings that an objective reads, and the default in place of others.

    Args:
        objective: The objective.
        given: Settings.
    """
    used = {x for c, own in _SETTINGS.items() if objective.required_inputs & inputs.names(c) for x in own}
    return dataclasses.replace(CollectorSettings(), **{name: getattr(given, name) for name in used})


def check(objective: Any, settings: Settings) -> None:
    """Check that an objective has the models that it reads, and that no setting is given that it does not read.

    Args:
        objective: The objective.
        settings: Settings of the run.

    Raises:
        ValueError: A model is missing, or a setting is not read.
    """
    given, method = settings.collectors, settings.objective.method
    used = read(objective, given)
    for f in dataclasses.fields(given):
        value, other = getattr(given, f.name), getattr(used, f.name)
        if value != other:
            raise ValueError(f"{f.name}: expected {other!r} because {method} does not read it, got {value!r}")
    for collector, own in _SETTINGS.items():
        for name in own if objective.required_inputs & inputs.names(collector) else ():
            if getattr(given, name) is None:
                raise ValueError(f"{name}: expected a model because of {method}, got None")


class FixedCollectors:
    """Gives batches of examples the inputs that do not change in training. Other models are loaded when they are read.

    Args:
        wanted: Names of the inputs.
        settings: Settings of the run.
        model: The policy before its first step, which is the reference policy.
        tokenizer: Its tokenizer.
        teachers: The teacher and the reverse teacher, or two times None.
    """

    def __init__(
        self,
        wanted: frozenset[str],
        settings: Settings,
        model: Any,
        tokenizer: Any,
        teachers: tuple[Any, Any] = (None, None),
    ) -> None:
        self._wanted, self._settings, self._teachers = wanted, settings, teachers
        self._model, self._tokenizer = model, tokenizer
        self._revise = RevisedPrompts(tokenizer, settings.chat)
        self._others: dict[str, Any] = {}

    def __call__(self, examples: Sequence[Example], batch: Rollouts) -> Rollouts:
        """Return a batch with the inputs.

        Args:
            examples: The examples.
            batch: Their rows, from :func:`~tokcredit.train.examples.batch_of`.
        """
        known = inputs.names("reference") | inputs.names("teachers")
        found = self._collect(self._wanted & known, batch, self._model)
        if "aligned_log_probs" in self._wanted:
            found["aligned_log_probs"] = self._log_probs(batch, self._beside("aligned"))
        if "contrastive_log_probs" in self._wanted:
            found["contrastive_log_probs"] = self._by_parts(self._contrastive, batch)
        if revised := self._wanted & inputs.names("revised_prompts"):
            better, worse = self._revised(examples, batch)
            for name in revised:
                prompts = better if name == "better_log_probs" else worse
                found[name] = self._log_probs(batch.with_inputs(prompt_tokens=prompts), self._model)
        if "reward_masks" in self._wanted:
            found["reward_masks"] = self._by_parts(self._masks, batch)
        if "field_weights" in self._wanted:
            rows = [self._of_fields(x.text, x.tokens) for example in examples for x in example.responses]
            found["field_weights"] = torch.tensor([w for row in rows for w in row], device=batch.device)
        return batch.with_inputs(**found)

    def _collect(self, wanted: frozenset[str], batch: Rollouts, reference: Any) -> dict[str, Tensor]:
        s = self._settings
        size, temperature = s.optimizer.micro_batch, s.sampling.temperature
        teacher, reverse = self._teachers
        models = (None, reference, teacher)
        found = collectors.collect(wanted, batch, size, *models, temperature, reverse_teacher=reverse)
        return {name: found.input(name) for name in wanted}

    def _log_probs(self, batch: Rollouts, model: Any) -> Tensor:
        return self._collect(frozenset({"ref_log_probs"}), batch, model)["ref_log_probs"]

    def _beside(self, option: str) -> Any:
        """Return the model that a setting names, on the device of the policy."""
        if option not in self._others:
            source: Any = self._settings if option == "aligned" else self._settings.collectors
            other = models.beside(option, getattr(source, option), self._tokenizer, self._settings.model)
            self._others[option] = other.to(self._model.device)
        return self._others[option]

    def _by_parts(self, function: Any, batch: Rollouts) -> Tensor:
        """Return what a function gives for a micro-batch at a time, for all tokens."""
        parts = torch.arange(batch.num_rows).split(self._settings.optimizer.micro_batch)
        return torch.cat([function(batch.select(rows)) for rows in parts])

    @torch.no_grad()
    def _contrastive(self, batch: Rollouts) -> Tensor:
        both = [self._beside(name) for name in ("positive", "negative")]
        prompts = virtual_tokens.known(both[0], batch.input("prompt_tokens"))
        packed = plan(batch.with_inputs(prompt_tokens=prompts))
        logits = [predict(model, packed, hidden_states=False, logits=True).logits for model in both]
        # The output layers may be padded to different numbers of ids.
        ids = min(x.shape[1] for x in logits if x is not None)
        first, second = (x[:, :ids] / self._settings.sampling.temperature for x in logits if x is not None)
        strength = self._settings.collectors.contrast
        return packed.to_rows(contrastive_log_probs(first, second, packed.target, strength))

    def _masks(self, batch: Rollouts) -> Tensor:
        with adapter.switched_off(self._model):
            prompts = virtual_tokens.known(self._model, batch.input("prompt_tokens"))
            batch = batch.with_inputs(prompt_tokens=prompts)
            found = activations.means(self._model, batch, self._settings.collectors.mask_activations)
        return activation_masks(found, batch.spans)

    def _revised(self, examples: Sequence[Example], batch: Rollouts) -> list[Tensor]:
        """Return the prompts that ask for a better and for a worse answer, int64 ``[R, P]`` each.

        They are revised prompts of the responses, also where these differ in an example. A response that is too long
        for the model under one of them keeps its own prompt under both.
        """
        s, longest = self._settings.collectors, getattr(self._model.config, "max_position_embeddings", None)
        found = []
        for example in (own for x in examples for own in x.under_own_prompts()):
            (response,) = example.responses
            words = [partial(_asked, x, response.text) for x in (s.better_template, s.worse_template)]
            both = [self._revise(example.revised(x)) for x in words]
            fits = longest is None or max(map(len, both)) + len(response.tokens) <= longest
            found.append(both if fits else [example.prompt] * 2)
        return [left_padded(list(prompts), -1, batch.device)[0] for prompts in zip(*found, strict=True)]

    def _of_fields(self, answer: str, tokens: Sequence[int]) -> list[float]:
        offsets, text = _offsets(self._tokenizer, tokens)
        # The text of several messages stands nowhere as it is.
        answer = answer if answer in text else text
        begin = text.rfind(answer)
        return field_weights(answer, [(a - begin, b - begin) for a, b in offsets])


def _asked(template: str, response: str, question: str) -> str:
    return filled(template, question=question, response=response)


def _offsets(tokenizer: Any, tokens: Sequence[int]) -> tuple[list[tuple[int, int]], str]:
    """Return the first character of each token and one past its last, and the text.

    Tokens that are parts of one character each have the whole of it.
    """
    stream = DecodeStream(skip_special_tokens=False)
    offsets: list[tuple[int, int]] = []
    text, waiting = "", 0
    for token in tokens:
        piece = stream.step(tokenizer.backend_tokenizer, token)
        waiting += 1
        if piece is not None:
            offsets += [(len(text), len(text) + len(piece))] * waiting
            text, waiting = text + piece, 0
    return offsets + [(len(text), len(text))] * waiting, text
