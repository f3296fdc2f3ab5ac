"""Prompt tuning: embeddings of virtual tokens that stand before every prompt (arXiv 2104.08691).

Virtual tokens have ids of their own, from :data:`FIRST` on, so they are cached, shared and padded as the other tokens
of a prompt. The model cannot choose them: the output layer stays as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FIRST = 2**30
"""Id of the first virtual token. No vocabulary is so large, and it is the same beside models whose embeddings are
padded differently."""


class VirtualPrompt(NamedTuple):
    """Which virtual tokens an adapter adds.

    Attributes:
        tokens: Number of them before a prompt.
        steps: None if only they are trained. A number if there are as many further tokens, which stand before rejected
            responses, and the whole model trains after so many steps.
    """

    tokens: int
    steps: int | None = None


class VirtualTokens(torch.nn.Module):
    """Input embeddings of a model, and those of further tokens, which are trained.

    Args:
        base: Input embeddings of the model.
        kind: Which virtual tokens there are. They begin as random tokens of the vocabulary.

    Attributes:
        kind: The same.
        enabled: Whether there are virtual tokens; the model is else what it was.
    """

    def __init__(self, base: torch.nn.Embedding, kind: VirtualPrompt) -> None:
        super().__init__()
        self.base, self.kind, self.enabled = base, kind, True
        chosen = torch.randint(base.num_embeddings, (kind.tokens if kind.steps is None else 2 * kind.tokens,))
        self.prompt = torch.nn.Parameter(base.weight.detach()[chosen].clone())

    @property
    def weight(self) -> Tensor:
        """Embeddings of the vocabulary."""
        return self.base.weight

    @property
    def ids(self) -> list[int]:
        """Token ids of the virtual tokens that stand before a prompt, unless the response is a rejected one."""
        return list(range(FIRST, FIRST + self.kind.tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens, ``(..., d)``.

        Args:
            tokens: Integers ``(...)``.
        """
        virtual = tokens >= FIRST
        own: Tensor = self.base(tokens.masked_fill(virtual, 0))
        return torch.where(virtual[..., None], self.prompt[(tokens - FIRST).clamp(min=0)].to(own.dtype), own)


def of(model: Any) -> VirtualTokens | None:
    """Return the input embeddings of a model if they have virtual tokens, or None.

    Args:
        model: Causal language model of transformers.
    """
    embeddings = model.get_input_embeddings()
    return embeddings if isinstance(embeddings, VirtualTokens) else None


def add(model: Any, kind: VirtualPrompt) -> None:
    """Give a model virtual tokens, in place. Unless the whole model is to train later, only they require gradients.

    Args:
        model: Causal language model of transformers.
        kind: Which virtual tokens.
    """
    model.requires_grad_(kind.steps is not None)
    model.set_input_embeddings(VirtualTokens(model.get_input_embeddings(), kind))


def for_step(model: Any, number: int) -> None:
    """Let all weights of a model require gradients, or its virtual tokens alone, if that depends on the step.

    Args:
        model: Causal language model of transformers.
        number: Number of the step, from 1.
    """
    embeddings = of(model)
    if embeddings is not None and embeddings.kind.steps is not None:
        model.requires_grad_(number > embeddings.kind.steps)
        embeddings.prompt.requires_grad_(True)


def of_rejected(model: Any, prompts: Tensor, rejected: Tensor) -> Tensor:
    """Return prompts that have, in rows of rejected responses, the virtual tokens for these.

    Args:
        model: Causal language model of transformers.
        prompts: Integers ``(R, P)``.
        rejected: bool ``[R]``.
    """
    embeddings = of(model)
    if embeddings is None or embeddings.kind.steps is None:
        return prompts
    virtual = prompts >= FIRST
    return torch.where(virtual & rejected[:, None], prompts + embeddings.kind.tokens, prompts)


def known(model: Any, prompts: Tensor) -> Tensor:
    """Return left-padded prompts without the virtual tokens that a model does not have.

    Args:
        model: Causal language model of transformers.
        prompts: Integers ``(B, P)``, -1 at padding.
    """
    embeddings = of(model)
    if embeddings is not None and embeddings.enabled:
        return prompts
    return prompts.masked_fill(prompts >= FIRST, -1)


def save(model: Any, folder: Path, base: str) -> None:
    """Write the virtual tokens as peft does.

    If the whole model trained, it is written as a model without virtual tokens, and these into ``good`` and ``bad``.

    Args:
        model: Model with virtual tokens.
        folder: Folder to write into.
        base: Name or folder of the model.
    """
    embeddings = of(model)
    assert embeddings is not None
    if embeddings.kind.steps is None:
        _save(embeddings.prompt, folder, base)
        return
    model.set_input_embeddings(embeddings.base)
    try:
        model.save_pretrained(folder)
    finally:
        model.set_input_embeddings(embeddings)
    for name, part in zip(("good", "bad"), embeddings.prompt.split(embeddings.kind.tokens), strict=True):
        _save(part, folder / name, "..")


def _save(prompt: Tensor, folder: Path, base: str) -> None:
    from peft import PromptTuningConfig
    from safetensors.torch import save_file

    count, width = prompt.shape
    PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=count, token_dim=width, base_model_name_or_path=base
    ).save_pretrained(str(folder))
    save_file({"prompt_embeddings": prompt.detach().clone().cpu()}, str(folder / "adapter_model.safetensors"))
