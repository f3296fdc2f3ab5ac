"""The output layer of a transformers model apart from its body, so that logits need not exist."""

from __future__ import annotations

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

    The first time, the logits of a few tokens are compared with those of the model itself.

    Args:
        model: Causal language model of transformers.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear or body(model) is model:
        return None
    config, settings = model.config, {}
    if cap := getattr(config, "final_logit_softcapping", None):
        settings["softcap"] = float(cap)
    if scale := getattr(config, "logit_scale", None):
        settings["scale"] = float(scale)
    if divisor := getattr(config, "logits_scaling", None):
        settings["scale"] = 1 / float(divisor)
    found = OutputLayer(layer.weight, layer.bias, settings)
    if model not in _known:
        _known[model] = _agrees(model, found)
    return found if _known[model] else None


def body(model: Any) -> Any:
    """Return the model without its output layer; its first result are final hidden states.

    Args:
        model: Causal language model of transformers.
    """
    return model.base_model


@torch.no_grad()
def _agrees(model: Any, layer: OutputLayer) -> bool:
    training, device = model.training, layer.weight.device
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            ids = torch.arange(4, device=device)[None] % layer.weight.shape[0]
            hidden, logits = body(model)(ids, use_cache=False)[0], model(ids, use_cache=False).logits.float()
            ours = head.log_probs_and_entropies(hidden, layer.weight, ids, layer.bias, **layer.settings)
    finally:
        model.train(training)
    log_p = logits.log_softmax(-1)
    expected = log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    tolerance = 1e-3 if layer.weight.dtype in (torch.float32, torch.float64) else 0.1
    return all(torch.allclose(a.float(), b, tolerance, tolerance) for a, b in zip(ours, expected, strict=True))
