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

_FILE = "adapter.pt"
CONFIG = "adapter_config.json"
"""File that tells the folder of an adapter from that of a model."""


def config(text: str) -> Any:
    """Return the configuration of an adapter, as peft takes it.

    Args:
        text: ``lora(r=16, alpha=32.0, targets='all-linear')``, or its name.

    Raises:
        ImportError: peft is not installed.
        ValueError: There is no such adapter, or a setting is wrong.
    """
    if find_spec("peft") is None:
        raise ImportError('adapter: needs peft: pip install "tokcredit[train]"')
    return construct(text, "adapter", {"lora": _lora})


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
        try:
            model.add_adapter(made)
        except ValueError as error:
            raise ValueError(f"adapter: expected targets in {type(model).__name__}, got {text}: {error}") from error
    # The folder of the adapter names its base, which may not depend on the working directory.
    base = Path(model.name_or_path)
    made.base_model_name_or_path = str(base.resolve()) if base.exists() else model.name_or_path


def has_one(model: Any) -> bool:
    """Return whether an adapter was added to a model.

    Args:
        model: Causal language model of transformers.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Make a model what it was before its adapter was added, inside this context. Without an adapter nothing changes.

    Args:
        model: Causal language model of transformers.
    """
    if not has_one(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def keep_apart(model: Any, accelerator: Accelerator) -> None:
    """Make checkpoints hold the adapter of a model in place of all its weights.

    Args:
        model: Model with an adapter.
        accelerator: Accelerator that saves and loads checkpoints.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            adapter = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
            torch.save(adapter, Path(folder) / _FILE)

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        weights = torch.load(Path(folder) / _FILE, map_location=model.device, weights_only=True)
        set_peft_model_state_dict(model, weights, adapter_name="default")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of a model by name, those of its adapter added to them. The model stays as it is.

    Args:
        model: Causal language model of transformers.
    """
    weights = dict(model.state_dict())
    if not has_one(model):
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
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about what peft reads
        return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
