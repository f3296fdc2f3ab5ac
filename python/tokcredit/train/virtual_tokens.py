"""Prompt tuning: embeddings of virtual tokens that stand before every prompt (arXiv 2104.08691).

Virtual tokens have ids of their own, from the size of the vocabulary on, so they are cached, shared and padded as the
other tokens of a prompt. The model cannot choose them: the output layer stays as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class VirtualTokens(torch.nn.Module):
    """Input embeddings of a model, and those of further tokens, which are trained.

    Args:
        base: Input embeddings of the model.
        count: Number of virtual tokens. They begin as random tokens of the vocabulary.

    Attributes:
        enabled: Whether there are virtual tokens; the model is else what it was.
    """

    def __init__(self, base: torch.nn.Embedding, count: int) -> None:
        super().__init__()
        self.base, self.enabled = base, True
        chosen = torch.randint(base.num_embeddings, (count,))
        self.prompt = torch.nn.Parameter(base.weight.detach()[chosen].clone())

    @property
    def ids(self) -> list[int]:
        """Token ids of the virtual tokens."""
        first = self.base.num_embeddings
        return list(range(first, first + len(self.prompt)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens, ``(..., d)``.

        Args:
            tokens: Integers ``(...)``.
        """
        size = self.base.num_embeddings
        virtual = (tokens >= size)[..., None]
        own: Tensor = self.base(tokens.clamp(max=size - 1))
        return torch.where(virtual, self.prompt[(tokens - size).clamp(min=0)].to(own.dtype), own)


def of(model: Any) -> VirtualTokens | None:
    """Return the input embeddings of a model if they have virtual tokens, or None.

    Args:
        model: Causal language model of transformers.
    """
    embeddings = model.get_input_embeddings()
    return embeddings if isinstance(embeddings, VirtualTokens) else None


def add(model: Any, count: int) -> None:
    """Give a model virtual tokens, in place. From then on only they require gradients.

    Args:
        model: Causal language model of transformers.
        count: Number of virtual tokens.
    """
    model.requires_grad_(False)
    model.set_input_embeddings(VirtualTokens(model.get_input_embeddings(), count))


def known(model: Any, prompts: Tensor) -> Tensor:
    """Return left-padded prompts without the virtual tokens that a model does not have.

    Args:
        model: Causal language model of transformers.
        prompts: Integers ``(B, P)``, -1 at padding.
    """
    embeddings = of(model)
    if embeddings is not None and embeddings.enabled:
        return prompts
    size = embeddings.base.num_embeddings if embeddings is not None else model.get_input_embeddings().num_embeddings
    return prompts.masked_fill(prompts >= size, -1)


def save(model: Any, folder: Path, base: str) -> None:
    """Write the virtual tokens as peft does.

    Args:
        model: Model with virtual tokens.
        folder: Folder to write into.
        base: Name or folder of the model.
    """
    from peft import PromptTuningConfig
    from safetensors.torch import save_file

    embeddings = of(model)
    assert embeddings is not None
    count, width = embeddings.prompt.shape
    PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=count, token_dim=width, base_model_name_or_path=base
    ).save_pretrained(str(folder))
    save_file({"prompt_embeddings": embeddings.prompt.detach().cpu()}, str(folder / "adapter_model.safetensors"))
