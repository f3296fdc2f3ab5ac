"""Log-probs and entropies from hidden states as one operation of a graph that ``torch.compile`` makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokcredit.blocks.head import gradients, positions, scattered, statistics
from tokcredit.ops.call import accumulated, operation, result
from tokcredit.ops.logits import LogitSums

_NAMES = ("temperature", "softcap", "scale", "vocabulary", "logits_dtype", "tile_bytes")
_SETTINGS = (
    "Tensor? temperatures, float temperature, float? softcap, float scale, int? vocabulary, ScalarType? logits_dtype, "
    "int? tile_bytes"
)


def _named(temperatures: Tensor | None, *settings: Any) -> dict[str, Any]:
    named = dict(zip(_NAMES, settings, strict=True))
    return named if temperatures is None else named | {"temperature": temperatures}


_INPUTS = f"Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? rows, Tensor? chosen, {_SETTINGS}"


def _outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Tensor | None,
    chosen: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    dtype, shape = accumulated(hidden.dtype), tokens.shape
    # A schema has no optional results. No shape is wrong here: the operation itself says what it expects.
    of_squares = shape if arguments[-1] else (0,)
    of_chosen = (0,) if chosen is None else (*shape, *chosen.shape[-1:])
    shapes = (shape, shape, of_squares, of_chosen)
    return (*(result(hidden, x, dtype) for x in shapes), result(hidden, shape, torch.float64))


@operation(f"head({_INPUTS}, bool squares) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _outputs)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Tensor | None,
    chosen: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *settings, squares = arguments
    with torch.autocast(hidden.device.type, enabled=False):
        *_, tiles, rows = positions(hidden, weight, bias, tokens, rows, _named(*settings), chosen)
        found = statistics(tiles, squares)
    dtype = accumulated(hidden.dtype)
    return tuple(hidden.new_empty(0, dtype=dtype) if x is None else scattered(x, rows, tokens.shape) for x in found)


def _gradient_outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    wanted = arguments[-3:]
    inputs = zip((hidden, weight, weight if bias is None else bias), wanted, strict=True)
    return tuple(result(x, x.shape if asked else (0,)) for x, asked in inputs)


@operation(
    f"head_gradient({_INPUTS}, Tensor log_probs, Tensor entropies, Tensor? squares, Tensor? chosen_log_probs, "
    "Tensor normalizers, Tensor? grad_log_probs, Tensor? grad_entropies, Tensor? grad_squares, Tensor? grad_chosen, "
    "bool of_hidden, bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)",
    _gradient_outputs,
)
def _gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Tensor | None,
    chosen: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    settings, numbers, (of_hidden, of_weight, of_bias) = arguments[:7], arguments[7:16], arguments[16:]
    # Without attributes such as `main_grad`: an operation of a graph may change no other tensor.
    hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        *_, tiles, rows = positions(hidden, weight, bias, tokens, rows, _named(*settings), chosen)
        own: list[Any] = [None if x is None else x.flatten(0, tokens.dim() - 1)[rows] for x in numbers]
        wanted = (of_hidden, of_weight, of_bias)
        found = list(gradients(tiles, wanted, LogitSums(*own[:5]), tuple(own[5:])))
    if found[0] is not None:
        flat = torch.zeros_like(hidden, memory_format=torch.contiguous_format).view(-1, hidden.shape[-1])
        found[0] = flat.index_copy_(0, rows, found[0]).view(hidden.shape)
    return tuple(hidden.new_empty(0) if x is None else x for x in found)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        log_probs, entropies, *further, normalizers = _forward(*arguments)
        asked = (arguments[-1], arguments[5] is not None)
        squared, chosen = (x if wanted else None for x, wanted in zip(further, asked, strict=True))
        ctx.save_for_backward(*arguments[:7], log_probs, entropies, squared, chosen, normalizers)
        ctx.settings = arguments[7:-1]
        ctx.set_materialize_grads(False)
        return log_probs, entropies, squared, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, sums, wanted = ctx.saved_tensors[:7], ctx.saved_tensors[7:], ctx.needs_input_grad[:3]
        found = _gradient(*inputs, *ctx.settings, *sums, *given, *wanted)
        return (*(x if asked else None for x, asked in zip(found, wanted, strict=True)), *(None,) * 11)


def log_probs_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    squares: bool,
    chosen: Tensor | None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    vocabulary: int | None = None,
    logits_dtype: torch.dtype | None = None,
    tile_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """Return what the function of this name in :mod:`tokcredit.blocks.head` returns, as one operation.

    Args:
        hidden: As there, in the dtype of the product.
        weight: As there.
        tokens: As there.
        bias: As there.
        rows: As there.
        squares: As there.
        chosen: As there.
        temperature: As in :class:`tokcredit.blocks.head.Head`.
        softcap: As there.
        scale: As there.
        vocabulary: As there.
        logits_dtype: As there.
        tile_bytes: As there.
    """
    temperatures = temperature if isinstance(temperature, Tensor) else None
    common = 1.0 if isinstance(temperature, Tensor) else temperature
    settings = (temperatures, common, softcap, scale, vocabulary, logits_dtype, tile_bytes)
    found = _Head.apply(hidden, weight, bias, tokens, rows, chosen, *settings, squares)
    return tuple(x for x in found if x is not None)
