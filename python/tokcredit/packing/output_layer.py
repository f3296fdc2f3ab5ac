"""The output layer of a transformers model apart from its body, so that logits need not exist."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokcredit.blocks import head


class OutputLayer(NamedTuple):
    """What turns final hidden states into logits.

    Attributes:
        weight: float ``[V, d]``.
        bias: float ``[V]`` or None.
        settings: Further settings of :class:`tokcredit.blocks.head.Head`, by name.
    """

    weight: Tensor
    bias: Tensor | None
    settings: dict[str, Any]


_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def output_layer(model: Any) -> OutputLayer | None:
    """Return the output layer of a model, or None if its logits are not those of a linear layer on its hidden states.

    LoRA adapters of the layer are part of its weight, ``W + scaling * B @ A``, which has a gradient to A and B.

    The first time, the logits of a few tokens are compared with those of the model itself, and again with hidden states
    that are many times as large, where an unknown cap would show.

    Args:
        model: Causal language model of transformers.
    """
    linear = _linear(model.get_output_embeddings())
    if linear is None or body(model) is model:
        return None
    config, settings = model.config, {}
    if cap := getattr(config, "final_logit_softcapping", None):
        settings["softcap"] = float(cap)
    if scale := getattr(config, "logit_scale", None):
        settings["scale"] = float(scale)
    if divisor := getattr(config, "logits_scaling", None):
        settings["scale"] = 1 / float(divisor)
    found = OutputLayer(*linear, settings)
    if model not in _known:
        _known[model] = _agrees(model, found)
    return found if _known[model] else None


def _linear(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a linear layer, with its LoRA adapters, or None if it is another layer."""
    if type(layer) is torch.nn.Linear:
        return layer.weight, layer.bias
    peft = sys.modules.get("peft.tuners.lora.layer")  # a model with an adapter has imported it
    if peft is None or type(layer) is not peft.Linear or type(layer.base_layer) is not torch.nn.Linear:
        return None
    if layer.lora_variant or any(layer.lora_bias.values()) or (layer.merged and layer.disable_adapters):
        return None
    weight = layer.base_layer.weight
    if not (layer.merged or layer.disable_adapters):
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name)
    return weight, layer.base_layer.bias


def body(model: Any) -> Any:
    """Return the model without its output layer; its first result are final hidden states.

    Args:
        model: Causal language model of transformers.
    """
    return model.base_model


@torch.no_grad()
def _agrees(model: Any, layer: OutputLayer) -> bool:
    trained, device = [part for part in model.modules() if part.training], layer.weight.device
    ids = torch.arange(4, device=device)[None] % layer.weight.shape[0]
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            return all(_agree_on(model, layer, ids, factor) for factor in (1.0, 64.0))
    finally:
        for part in trained:
            part.training = True


def _agree_on(model: Any, layer: OutputLayer, ids: Tensor, factor: float) -> bool:
    hidden = body(model)(ids, use_cache=False)[0]
    if hidden.shape != (*ids.shape, layer.weight.shape[1]) or hidden.dtype != layer.weight.dtype:
        return False
    enlarged = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0] * factor,))
    try:
        log_p = model(ids, use_cache=False).logits.float().log_softmax(-1)
    finally:
        enlarged.remove()
    ours, _ = head.log_probs_and_entropies(hidden * factor, layer.weight, ids, layer.bias, **layer.settings)
    expected = log_p.gather(-1, ids[..., None])[..., 0]
    tolerance = 1e-3 if layer.weight.dtype in (torch.float32, torch.float64) else 0.1
    return torch.allclose(ours.float(), expected, tolerance, tolerance)
