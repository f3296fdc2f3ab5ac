"""Samplers: engines that continue prompts, and return token ids with the log-probs they were sampled with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import StopStringCriteria

from tokcredit.decoding.temperature import AdaptiveTemperature
from tokcredit.train.generation import Generation

_BLOCK = 256
"""Tokens whose probabilities are added up together."""


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
        batch: Largest number of rows generated at once; a row that has ended makes room for the next.
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

        Each row has random numbers of its own. Apart from the rounding of logits it depends neither on the other rows
        nor on ``batch``.

        Args:
            prompts: Token ids of each prompt.
            count: Continuations of each prompt.
            max_tokens: Largest number of tokens of a continuation.
            temperature: Sampling temperature; 0 is greedy.
            stop: Texts that end a continuation, with the token that completes one of them.

        Raises:
            RuntimeError: A logit is NaN or infinite.
        """
        total, device = len(prompts) * count, self.device
        uniforms = torch.rand(total, max_tokens, dtype=torch.float64).to(device) if temperature else None
        tokens = torch.zeros(total, max_tokens, dtype=torch.int64, device=device)
        log_probs = torch.zeros(total, max_tokens, device=device)
        lengths = torch.zeros(total, dtype=torch.int64, device=device)
        finished = torch.zeros(total, dtype=torch.bool, device=device)
        stops = StopStringCriteria(self._tokenizer, list(stop)) if stop else None
        generation = Generation(self._model, prompts, count, self._batch, max_tokens, self._pad)
        while (logits := generation.advance()) is not None:
            rows = generation.rows
            place = lengths[rows]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if uniforms is None:
                new = logits.argmax(-1)
                _check(logits.gather(1, new[:, None]))
            else:
                probs = self._scaled(logits, temperature).softmax(-1)
                new = draw(probs, uniforms[rows, place])
                log_probs[rows, place] = probs.gather(1, new[:, None])[:, 0].log().float()
            tokens[rows, place] = new
            lengths[rows] += 1
            ended = torch.isin(new, self._ends)
            if stops:
                ended |= stops(_last(tokens[rows], lengths[rows], stops.maximum_token_len), None)
            finished[rows] = ended
            generation.keep(new, ~ended & (lengths[rows] < max_tokens))
        inside = torch.arange(max_tokens, device=device) < lengths[:, None]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Completions(tokens[inside], cu_seqlens, log_probs[inside], finished)

    def _scaled(self, logits: Tensor, temperature: float) -> Tensor:
        """Return the logits divided by the temperature."""
        if self._adaptive is not None and self._adaptive.temperature == temperature:
            return self._adaptive(logits.new_empty(len(logits), 0, dtype=torch.int64), logits)
        return logits / temperature


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return a token of each distribution: the first one up to which the probability is more than ``uniforms``.

    Probabilities are added up in float64, first those of blocks of tokens, then those inside the block found.

    Args:
        probs: float ``(n, V)``, probabilities of the tokens, up to a factor.
        uniforms: float64 ``[n]``, at least 0 and less than 1.

    Returns:
        int64 ``[n]``; the probability of each token is above 0.

    Raises:
        RuntimeError: A probability is NaN or infinite.
    """
    blocks = functional.pad(probs, (0, -probs.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    edges = blocks.sum(2, dtype=torch.float64).cumsum(1)
    _check(edges[:, -1])
    block, level = _found(edges, uniforms[:, None] * edges[:, -1:])
    inside = blocks[torch.arange(len(probs), device=probs.device), block[:, 0]].double().cumsum(1)
    within, _ = _found(inside, level)
    return (block * _BLOCK + within)[:, 0]


def _found(sums: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first place where sums exceed a level, at most the last place where they rise, and the level above."""
    top = torch.nextafter(sums[:, -1:], sums.new_zeros(()))
    place = torch.searchsorted(sums, level.minimum(top), right=True)
    before = sums.gather(1, (place - 1).clamp(min=0)).where(place > 0, 0.0)
    return place, (level - before).clamp(min=0)


def _check(values: Tensor) -> None:
    if not values.isfinite().all():
        raise RuntimeError("sampler: expected finite logits, got NaN or infinity; are the weights of the model finite?")


def _last(tokens: Tensor, lengths: Tensor, number: int) -> Tensor:
    """Return so many last tokens of each row, with ids outside of any vocabulary before its first."""
    place = lengths[:, None] + torch.arange(-number, 0, device=tokens.device)
    return tokens.gather(1, place.clamp(min=0)).masked_fill(place < 0, 2**62)
