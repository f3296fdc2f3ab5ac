"""Adapters: a few weights that are trained while the model itself stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tokcredit.expression import construct
from tokcredit.settings import Range
from tokcredit.train import virtual_tokens
from tokcredit.train.virtual_tokens import VirtualPrompt

_FILE = "adapter.pt"
CONFIG = "adapter_config.json"
"""File that tells the folder of an adapter from that of a model."""


def config(text: str) -> Any:
    """Return the configuration of LoRA, as peft takes it, or which virtual tokens there are.

    Args:
        text: ``lora(r=16, alpha=32.0, targets='all-linear')``, ``prompt(tokens=20)``, ``control(tokens=20, steps=50)``,
            or one of their names.

    Raises:
        ImportError: peft is not installed.
        ValueError: There is no such adapter, or a setting is wrong.
    """
    if find_spec("peft") is None:
        raise ImportError('adapter: needs peft: pip install "tokcredit[train]"')
    return construct(text, "adapter", {"lora": _lora, "prompt": _prompt, "control": _control})


def _lora(
    r: Annotated[int, Range("whole number", at_least=1)] = 16,
    alpha: Annotated[float, Range("number", above=0)] = 32.0,
    targets: Annotated[str, Range("text")] = "all-linear",
) -> Any:
    """Return the configuration of LoRA, arXiv 2106.09685: ``W + alpha / r * B A`` in place of ``W``. First ``B`` is 0.

    Args:
        r: Rank of the product.
        alpha: Its factor, times ``r``.
        targets: Regular expression of the names of the linear layers, or ``all-linear`` for all but the output layer.
    """
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)


def _prompt(tokens: Annotated[int, Range("whole number", at_least=1)] = 20) -> VirtualPrompt:
    """Return the virtual tokens of prompt tuning.

    Args:
        tokens: Number before every prompt.
    """
    return VirtualPrompt(tokens)


def _control(
    tokens: Annotated[int, Range("whole number", at_least=1)] = 20,
    steps: Annotated[int, Range("whole number", at_least=0)] = 50,
) -> VirtualPrompt:
    """Return the control tokens of MEET, arXiv 2310.00819: good ones and bad ones, learned before the model.

    Args:
        tokens: Number before every prompt: of good ones, or of bad ones where the response is a rejected one.
        steps: Number of steps in which only they train. Then the whole model trains with them.
    """
    return VirtualPrompt(tokens, steps)


def add(model: Any, text: str, seed: int) -> None:
    """Add an adapter to a model, in place. From then on only the adapter requires gradients.

    Args:
        model: Causal language model of transformers.
        text: The adapter; see :func:`config`.
        seed: Seed of its weights.

    Raises:
        ValueError: No layer of the model has the name of a target.
    """
    made = config(text)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(made, VirtualPrompt):
            virtual_tokens.add(model, made)
            return
        try:
            model.add_adapter(made)
        except ValueError as error:
            raise ValueError(f"adapter: expected targets in {type(model).__name__}, got {text}: {error}") from error
    made.base_model_name_or_path = _base(model)


def _base(model: Any) -> str:
    """Return what the folder of an adapter calls its model, which may not depend on the working directory."""
    path = Path(model.name_or_path)
    return str(path.resolve()) if path.exists() else str(model.name_or_path)


def save(model: Any, folder: Path) -> None:
    """Write a model, or its adapter if it has one.

    Args:
        model: Causal language model of transformers.
        folder: Folder to write into.
    """
    if virtual_tokens.of(model) is not None:
        virtual_tokens.save(model, folder, _base(model))
    else:
        model.save_pretrained(folder)
    model.config.save_pretrained(folder)  # which the folder of an adapter lacks


def prefix(model: Any) -> list[int]:
    """Return the tokens that stand before every prompt of a model because of its adapter.

    Args:
        model: Causal language model of transformers.
    """
    embeddings = virtual_tokens.of(model)
    return [] if embeddings is None else embeddings.ids


def has_one(model: Any) -> bool:
    """Return whether an adapter was added to a model.

    Args:
        model: Causal language model of transformers.
    """
    return _has_lora(model) or virtual_tokens.of(model) is not None


def _has_lora(model: Any) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Make a model what it was before its adapter was added, inside this context. Without an adapter nothing changes.

    Args:
        model: Causal language model of transformers.
    """
    embeddings = virtual_tokens.of(model)
    if embeddings is not None:
        embeddings.enabled = False
    if _has_lora(model):
        model.disable_adapters()
    try:
        yield
    finally:
        if embeddings is not None:
            embeddings.enabled = True
        if _has_lora(model):
            model.enable_adapters()


def keep_apart(model: Any, accelerator: Accelerator) -> None:
    """Make checkpoints hold the adapter of a model in place of all its weights, unless all of them train.

    Args:
        model: Model with an adapter.
        accelerator: Accelerator that saves and loads checkpoints.
    """
    if all(p.requires_grad for p in model.parameters()):
        return
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            torch.save({name: p.detach() for name, p in trained.items()}, Path(folder) / _FILE)

    @torch.no_grad()
    def load(models: list[Any], folder: str) -> None:
        models.clear()
        weights = torch.load(Path(folder) / _FILE, map_location=model.device, weights_only=True)
        for name, p in trained.items():
            p.copy_(weights[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of a model by name, those of its adapter added to them. The model stays as it is.

    Args:
        model: Causal language model of transformers.
    """
    weights = dict(model.state_dict())
    if not _has_lora(model):
        return weights
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            own = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
            base = {key.replace(".base_layer.", "."): w for key, w in own.items() if ".base_layer." in key}
            base[f"{name}.weight"] = base[f"{name}.weight"] + layer.get_delta_weight("default")
            weights |= base
    return weights


def merge(base: Any, folder: Path) -> Any:
    """Return a model with the adapter of a folder added to its weights.

    Args:
        base: The model that the adapter was trained on, which is changed.
        folder: Folder of the adapter.

    Raises:
        ValueError: It is no LoRA.
    """
    from peft import PeftConfig, PeftModel

    if (kind := PeftConfig.from_pretrained(str(folder)).peft_type) != "LORA":
        raise ValueError(f"model: expected an adapter that can be merged, LoRA, got {kind.value} in {folder}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about what peft reads
        return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
