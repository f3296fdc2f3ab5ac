"""Samplers: engines that continue prompts, and return token ids with the log-probs they were sampled with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StopStringCriteria

from tokcredit.blocks import log_probs
from tokcredit.decoding.temperature import AdaptiveTemperature
from tokcredit.train.scoring import left_padded, prefill


class Completions(NamedTuple):
    """Continuations of prompts, packed one after another; those of a prompt are neighbours.

    Attributes:
        tokens: int64 ``[N]``, with the end token, or the tokens of the text that stopped the row.
        cu_seqlens: int64 ``[R + 1]``, offsets from 0 to N.
        log_probs: float32 ``[N]``, log-probs of the distributions that tokens were sampled from, nats; 0 for greedy
            decoding.
        finished: bool ``[R]``, False for a row that was cut at the length limit.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    log_probs: Tensor
    finished: Tensor


class Sampler(Protocol):
    """An engine that continues prompts with the current policy."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        max_tokens: int,
        temperature: float,
        stop: Sequence[str] = (),
    ) -> Completions:
        """Return continuations of prompts, sampled with torch's default generator.

        Args:
            prompts: Token ids of each prompt.
            count: Continuations of each prompt.
            max_tokens: Largest number of tokens of a continuation.
            temperature: Sampling temperature; 0 is greedy.
            stop: Texts that end a continuation, with the token that completes one of them.
        """

    def sync(self) -> None:
        """Take over the weights of the trained model."""

    @property
    def device(self) -> torch.device:
        """Device of the continuations."""


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a response, at least one.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: Neither the generation configuration of the model nor the tokenizer has one.
    """
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends in (None, []) else ends
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    if not ends:
        raise ValueError(
            f"eos_token_id: expected a token that ends responses in the generation configuration of "
            f"{type(model).__name__} or in its tokenizer, got none"
        )
    return ends


class TransformersSampler:
    """Samples with the trained model itself, or with a copy of it in another dtype.

    Args:
        model: Causal language model that is trained.
        tokenizer: Its tokenizer, for the padding token and for texts to stop at.
        dtype: Dtype of the copy, or None to sample with the model itself.
        batch: Largest number of rows generated at once.
        adaptive: Temperature per token, which replaces the plain one when sampling at the same base temperature.
        stops: Tokens that end a response beside those of the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dtype: torch.dtype | None = None,
        batch: int = 256,
        adaptive: AdaptiveTemperature | None = None,
        stops: Sequence[int] = (),
    ) -> None:
        self._trained = model
        self._model = model if dtype is None else copy.deepcopy(model).to(dtype).eval()
        self._ends = torch.tensor([*end_tokens(model, tokenizer), *stops], device=model.device)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(self._ends[0])
        self._tokenizer, self._batch, self._adaptive = tokenizer, batch, adaptive

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._model.device

    def sync(self) -> None:
        """Copy the weights of the trained model, if a copy samples."""
        if self._model is not self._trained:
            with torch.no_grad():
                torch._foreach_copy_(list(self._model.parameters()), list(self._trained.parameters()))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        max_tokens: int,
        temperature: float,
        stop: Sequence[str] = (),
    ) -> Completions:
        """Return continuations of prompts, sampled with torch's default generator.

        Args:
            prompts: Token ids of each prompt.
            count: Continuations of each prompt.
            max_tokens: Largest number of tokens of a continuation.
            temperature: Sampling temperature; 0 is greedy.
            stop: Texts that end a continuation, with the token that completes one of them.
        """
        step = max(1, self._batch // count)
        parts = [
            self._sample(prompts[i : i + step], count, max_tokens, temperature, stop)
            for i in range(0, len(prompts), step)
        ]
        lengths = torch.cat([p.cu_seqlens.diff() for p in parts])
        return Completions(
            torch.cat([p.tokens for p in parts]),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            torch.cat([p.log_probs for p in parts]),
            torch.cat([p.finished for p in parts]),
        )

    def _sample(
        self, prompts: Sequence[Sequence[int]], count: int, max_tokens: int, temperature: float, stop: Sequence[str]
    ) -> Completions:
        device = self._model.device
        ids, real = left_padded(prompts, self._pad, device)
        width = ids.shape[1]
        shared = prefill(self._model, ids, real)
        if shared is not None:
            shared.batch_repeat_interleave(count)
        ids, real = ids.repeat_interleave(count, 0), real.repeat_interleave(count, 0)
        sampled = _Sampled(temperature, self._adaptive)
        stops = _Stops(self._tokenizer, stop, width) if stop else None
        config, self._model.generation_config = (
            self._model.generation_config,
            GenerationConfig(
                **({"do_sample": True, "top_k": 0} if temperature else {"do_sample": False}),
                max_new_tokens=max_tokens,
                eos_token_id=self._ends.tolist(),
                pad_token_id=self._pad,
            ),
        )
        try:
            out = self._model.generate(
                ids,
                attention_mask=real.long(),
                past_key_values=shared,
                logits_processor=[sampled],
                stopping_criteria=[stops] if stops else None,
            )
        finally:
            self._model.generation_config = config
        tokens = out[:, width:]
        log_probs = sampled.finish(tokens)
        ends = torch.isin(tokens, self._ends)
        if stops:
            ends |= stops.found()
        finished = ends.any(1)
        lengths = torch.where(finished, ends.int().argmax(1) + 1, tokens.shape[1])
        inside = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Completions(tokens[inside], cu_seqlens, log_probs[inside], finished)


class _Sampled(LogitsProcessor):  # type: ignore[misc]
    """Divides logits by the temperature and keeps the log-prob of each sampled token. It stores one step's scores."""

    def __init__(self, temperature: float, adaptive: AdaptiveTemperature | None) -> None:
        self._temperature = temperature
        self._adaptive = adaptive if adaptive is not None and adaptive.temperature == temperature else None
        self._scores: Tensor | None = None
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids[:, -1])
        if self._temperature:
            scores = self._adaptive(input_ids, scores) if self._adaptive else scores / self._temperature
        self._scores = scores
        return scores

    def _record(self, tokens: Tensor) -> None:
        if self._scores is not None:
            values = log_probs.from_logits(self._scores, tokens) if self._temperature else torch.zeros(len(tokens))
            self._log_probs.append(values.to(tokens.device, torch.float32))

    def finish(self, tokens: Tensor) -> Tensor:
        """Return the log-probs of all tokens, ``(B, T)``, after the last was sampled."""
        self._record(tokens[:, -1])
        return torch.stack(self._log_probs, 1)


class _Stops(StoppingCriteria):  # type: ignore[misc]
    """Ends rows at some texts and records where."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], width: int) -> None:
        self._complete, self._width = StopStringCriteria(tokenizer, list(texts)), width
        self._found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: Any) -> Tensor:
        # Without the prompt, whose text may contain the beginning of a stop text.
        self._found.append(self._complete(input_ids[:, self._width :], scores))
        return self._found[-1]

    def found(self) -> Tensor:
        """Return whether each token completed a text, bool ``(B, T)``."""
        return torch.stack(self._found, 1)
