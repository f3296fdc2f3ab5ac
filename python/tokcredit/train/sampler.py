"""Rollouts from a language model: token ids and the log-probs they were drawn with."""

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
    """Continuations of some prompts, packed one after another, those of a prompt side by side.

    Attributes:
        tokens: int64 ``[N]``, the end token, or those of the text to stop at, included.
        cu_seqlens: int64 ``[R + 1]``.
        log_probs: float32 ``[N]``, of the distribution each token was drawn from; 0 where decoding was greedy.
        finished: bool ``[R]``, whether the row ended with one of these; the others were cut at the greatest length.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    log_probs: Tensor
    finished: Tensor


class Sampler(Protocol):
    """An engine that continues token-id prefixes with the current policy."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        max_tokens: int,
        temperature: float,
        stop: Sequence[str] = (),
    ) -> Completions:
        """``count`` continuations of each prompt, drawn with torch's generator; temperature 0 is greedy.

        A row also ends with the token that completes one of the texts ``stop`` in it.
        """

    def sync(self) -> None:
        """Takes over the weights of the trained model."""

    @property
    def device(self) -> torch.device:
        """Where completions are."""


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens with which the model ends a completion."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [ends] if isinstance(ends, int) else list(ends)


class TransformersSampler:
    """Batched generation by the trained model itself, or by a copy of it in another dtype.

    Args:
        model: the causal language model that is trained.
        tokenizer: its tokenizer, for the padding token and for texts to stop at.
        dtype: of the copy; None generates with the model itself.
        batch: rows generated at once at most.
        adaptive: takes the place of the plain temperature in draws at its own temperature.
        stops: tokens that end a completion besides the model's own.
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
        return self._model.device

    def sync(self) -> None:
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
        draws = _Draws(temperature, self._adaptive)
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
                logits_processor=[draws],
                stopping_criteria=[stops] if stops else None,
            )
        finally:
            self._model.generation_config = config
        tokens = out[:, width:]
        log_probs = draws.finish(tokens)
        ends = torch.isin(tokens, self._ends)
        if stops:
            ends |= stops.found()
        finished = ends.any(1)
        lengths = torch.where(finished, ends.int().argmax(1) + 1, tokens.shape[1])
        inside = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Completions(tokens[inside], cu_seqlens, log_probs[inside], finished)


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Divides by the temperature and keeps the log-prob of what was then drawn; memory is one step's scores."""

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
            drawn = log_probs.from_logits(self._scores, tokens) if self._temperature else torch.zeros(len(tokens))
            self._log_probs.append(drawn.to(tokens.device, torch.float32))

    def finish(self, tokens: Tensor) -> Tensor:
        """Log-probs of all tokens, ``(B, T)``, after the last was drawn."""
        self._record(tokens[:, -1])
        return torch.stack(self._log_probs, 1)


class _Stops(StoppingCriteria):  # type: ignore[misc]
    """Ends rows at some texts and keeps where that was."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], width: int) -> None:
        self._complete, self._width = StopStringCriteria(tokenizer, list(texts)), width
        self._found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: Any) -> Tensor:
        # Without the prompt, whose text may begin what a row then completes.
        self._found.append(self._complete(input_ids[:, self._width :], scores))
        return self._found[-1]

    def found(self) -> Tensor:
        """Whether a token completed a text, bool ``(B, T)``."""
        return torch.stack(self._found, 1)
