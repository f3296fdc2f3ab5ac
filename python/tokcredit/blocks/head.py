"""Log-probs and entropies from hidden states: the output layer of a language model, without its ``(N, V)`` logits.

The logits exist one tile at a time. With ``h`` a hidden state, ``W`` and ``b`` the output layer's weight and bias::

    x = scale * (W @ h + b)
    z = softcap * tanh(x / softcap) / temperature        # x / temperature without softcap
    log_probs = log softmax(z)[token]
    entropies = -sum(p * log(p) for p in softmax(z))
    squares = sum(p * p for p in softmax(z))

Positions without a token (-1) are removed before the first matrix product, so their hidden states, even NaN, change
neither results nor gradients. All matrix products are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokcredit import ops
from tokcredit.arguments import FLOATS, INTEGERS, describe, float_tensor, instance, tensor
from tokcredit.blocks.main_grad import added
from tokcredit.blocks.shard import Shard
from tokcredit.blocks.tiles import Head, Sums, Tiles, joined

__all__ = [
    "Head",
    "OnePass",
    "Shard",
    "dtype_of",
    "log_probs_and_entropies",
    "positions",
    "scattered",
    "separable_loss",
]


def statistics(tiles: Tiles, squares: bool) -> ops.LogitSums:
    """Return what is known of all positions from their logits.

    Args:
        tiles: The products.
        squares: Whether sums of squared probabilities are wanted.
    """
    parts = list(tiles.pieces()) or [(0, 0)]
    results = [tiles.statistics(tiles.logits(*at), *at, squares) for at in parts]
    tiles.free()
    columns: list[Any] = [None if x[0] is None else torch.cat(x) for x in zip(*results, strict=True)]
    return ops.LogitSums(*columns)


def gradients(
    tiles: Tiles, wanted: tuple[bool, bool, bool], sums: ops.LogitSums, given: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden states, weight and bias. Only positions with a gradient are computed.

    Args:
        tiles: The products.
        wanted: Whether each of the three is wanted; None is returned for one that is not.
        sums: From :func:`statistics`.
        given: Gradients to log-probs, entropies, squares and log-probs of chosen ids, each or None.
    """
    hidden, moving = tiles.hidden, [x != 0 if x.dim() == 1 else (x != 0).any(1) for x in given if x is not None]
    moves = torch.stack(moving).any(0).nonzero()[:, 0] if moving else hidden.new_empty(0).long()
    own, numbers = tiles, [*sums, *given]
    if moves.numel() < hidden.shape[0]:
        temperature, chosen = (None if x is None else x[moves] for x in (tiles.temperature, tiles.chosen))
        own = Tiles(tiles.head, hidden[moves], tiles.tokens[moves], temperature, chosen)
        numbers = [None if x is None else x[moves] for x in numbers]
    products = Sums(own, wanted, final=True)
    for first, last in own.pieces():
        part: list[Any] = [None if x is None else x[first:last] for x in numbers]
        z, found, (a, h, q, c) = own.logits(first, last), ops.LogitSums(*part[:5]), part[5:]
        products.add(first, last, own.gradient(z, first, last, found, (a, h, q, c)))
    own.free()
    of_hidden, of_weight, of_bias = products.results()
    if of_hidden is not None and own is not tiles:
        of_hidden = torch.zeros_like(hidden).index_copy_(0, moves, of_hidden)
    return of_hidden, of_weight, of_bias


class _TwoPasses(torch.autograd.Function):
    """Four products: the logits are computed again in the backward pass, only of positions with a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles, squares: bool
    ) -> tuple[Tensor | None, ...]:
        sums = statistics(tiles, squares)
        ctx.save_for_backward(hidden, weight, bias, *sums)
        ctx.tiles = tiles
        ctx.set_materialize_grads(False)
        return tuple(sums[:4])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        tiles, (_, _, _, *sums) = ctx.tiles, ctx.saved_tensors
        with torch.autocast(tiles.hidden.device.type, enabled=False):
            found = gradients(tiles, ctx.needs_input_grad[:3], ops.LogitSums(*sums), given)
        return (*found, None, None)


Slopes = Callable[[int, int, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]
Total = Callable[[Tensor, Tensor], Tensor]


class OnePass(torch.autograd.Function):
    """Base of a loss whose gradients are computed in the forward pass, and scaled in the backward pass.

    The first three arguments of ``forward`` are hidden states, weight and bias; it leaves their gradients in
    ``ctx.gradients`` and the weight in ``ctx.weight``.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, once.

        Args:
            ctx: From the forward pass.
            grad: Gradient to the loss.

        Raises:
            RuntimeError: This is the second backward pass.
        """
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("loss_from_hidden: expected one backward pass, got a second one through the same loss")
        others = len(ctx.needs_input_grad) - len(gradients)
        of_hidden, of_weight, of_bias = (None if x is None else x.mul_(grad) for x in gradients)
        return (of_hidden, added(ctx.weight, of_weight), of_bias, *(None,) * others)


class _SeparableLoss(OnePass):
    """Three products."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles, slopes: Slopes, total: Total
    ) -> Tensor:
        sums, results = Sums(tiles, ctx.needs_input_grad[:3]), []
        tiles.idle = idle = torch.empty(hidden.shape[0], dtype=torch.bool, device=hidden.device)

        for first, last in tiles.pieces():
            z = tiles.logits(first, last)
            found = tiles.statistics(z, first, last)
            results.append((found.log_probs, found.entropies))
            a, e = slopes(first, last, found.log_probs, found.entropies)
            given = [x == 0 for x in (a, e) if x is not None]
            idle[first:last] = torch.stack(given).all(0) if given else True
            sums.add(first, last, tiles.gradient(z, first, last, found, (a, e, None, None)))
        tiles.free()
        ctx.gradients, ctx.weight = sums.results(), tiles.head.weight
        return total(*joined(results, 2, hidden))


def dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype in which a float tensor enters a matrix product: that of autocast where it is on.

    Args:
        x: A tensor.
    """
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype in FLOATS and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def positions(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Tensor | None,
    settings: dict[str, Any],
    chosen: Tensor | None = None,
) -> tuple[Tensor, Head, Tiles, Tensor]:
    """Return the hidden states of positions with a token, the output layer, its tiles, and these positions.

    Args:
        hidden: As in :func:`log_probs_and_entropies`.
        weight: As there.
        bias: As there.
        tokens: As there.
        rows: As there.
        settings: Those of :class:`Head`.
        chosen: As in :func:`log_probs_and_entropies`.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or number is wrong.
    """
    hidden, weight = (float_tensor(name, x) for name, x in (("hidden", hidden), ("weight", weight)))
    hidden, weight = hidden.to(dtype_of(hidden)), weight.to(dtype_of(weight))
    bias = None if bias is None else float_tensor("bias", bias).to(dtype_of(bias))
    head = Head(weight, bias, **settings)
    instance("tokens", tokens, Tensor)
    if hidden.dim() < 2 or hidden.shape[:-1] != tokens.shape or hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(f"hidden: expected {[*tokens.shape, head.weight.shape[1]]}, got {describe(hidden)}")
    if hidden.dtype != head.weight.dtype or hidden.device != head.weight.device:
        raise TypeError(
            f"hidden: expected {head.weight.dtype} on {head.weight.device} as the weight, "
            f"got {hidden.dtype} on {hidden.device}"
        )
    tensor("tokens", tokens, INTEGERS, tuple(tokens.shape), hidden.device)
    flat = tokens.reshape(-1)
    if rows is None:
        rows = (flat != -1).nonzero()[:, 0]
        every = rows.numel() == flat.numel()
    else:
        tensor("rows", instance("rows", rows, Tensor), (torch.int64,), (rows.numel(),), hidden.device)
        every = False
    h, temperature = hidden.reshape(flat.numel(), hidden.shape[-1]), None
    if isinstance(head.temperature, Tensor):
        if head.temperature.numel() != flat.numel():
            raise ValueError(f"temperature: expected a number or [{flat.numel()}], got {describe(head.temperature)}")
        temperature = head.temperature.detach().reshape(-1)[rows]
    if not every:
        h, flat = h.index_select(0, rows), flat.index_select(0, rows)
    h, ids = h.contiguous(), None if chosen is None else _chosen(chosen, tokens, rows)
    return h, head, Tiles(head, h.detach(), flat.long().contiguous(), temperature, ids), rows


def _chosen(chosen: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Return the further ids of some positions, int64 ``[n, K]``."""
    instance("chosen", chosen, Tensor)
    size = chosen.shape[-1] if chosen.dim() else 1
    tensor("chosen", chosen, INTEGERS, (*(tokens.shape if chosen.dim() > 1 else ()), size), tokens.device)
    return chosen.long().expand(*tokens.shape, size).reshape(tokens.numel(), size).index_select(0, rows)


def scattered(x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor of a shape with ``x`` at some positions and 0 elsewhere.

    Args:
        x: ``[n]``, or ``[n, K]`` with several numbers at each position.
        rows: int64 ``[n]``, indices into the flat result.
        shape: Shape of the positions.
    """
    more = x.shape[1:]
    return x.new_zeros(math.prod(shape), *more).index_copy(0, rows, x).view(*shape, *more)


def log_probs_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    squares: bool = False,
    chosen: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """Return the log-prob of each token and the entropy of its distribution, with gradients.

    The backward pass computes the logits again, tile by tile, for the positions that have a gradient: four matrix
    products in all. A second derivative is not available. Under autocast, hidden states, weight and bias are cast to
    its dtype. Inside a function that ``torch.compile`` compiles this is one operation of its graph; with a shard it
    breaks the graph.

    Args:
        hidden: float ``(..., d)``, the hidden state from which each token is predicted.
        weight: float ``[V, d]``, the output layer's weight.
        tokens: int32 or int64 ``(...)``; -1 where a position takes no part: its results and gradients are 0.
        bias: float ``[V]`` or None.
        rows: int64, indices into ``tokens.reshape(-1)`` of the positions that take part. None takes all whose token is
            not -1, and on CUDA waits for the device to find them.
        squares: Whether the sum of squared probabilities of each position is a third result.
        chosen: int32 or int64 ``[K]``, or ``(..., K)`` with others at each position: further ids, whose log-probs are
            the last result; 0 for an id of -1.
        settings: ``temperature``, ``softcap``, ``scale``, ``vocabulary``, ``logits_dtype``, ``tile_bytes`` and
            ``shard`` of :class:`Head`. With a shard, all processes of its group call this and the backward pass
            together with the same hidden states and tokens; each gets the whole gradient of the hidden states and the
            gradient of its own rows of weight and bias.

    Returns:
        Two tensors ``(...)``, then a third with ``squares``, then ``(..., K)`` with ``chosen``: float32, or float64 for
        float64 hidden states. All have gradients.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or number is wrong, or on the CPU an id is out of range.
    """
    if torch.compiler.is_compiling() and settings.get("shard") is None:
        from tokcredit.blocks import head_op

        hidden, weight = hidden.to(dtype_of(hidden)), weight.to(dtype_of(weight))
        bias = None if bias is None else bias.to(dtype_of(bias))
        whole = {name: x for name, x in settings.items() if name != "shard"}
        return head_op.log_probs_and_entropies(hidden, weight, tokens, bias, rows, squares, chosen, **whole)
    return _two_passes(hidden, weight, tokens, bias, rows, squares, chosen, settings)


@ops.uncompiled
def _two_passes(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    squares: bool,
    chosen: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:
    h, head, tiles, rows = positions(hidden, weight, bias, tokens, rows, settings, chosen)
    if not isinstance(squares, bool):
        raise TypeError(f"squares: expected True or False, got {describe(squares)}")
    with torch.autocast(hidden.device.type, enabled=False):
        found = _TwoPasses.apply(h, head.weight, head.bias, tiles, squares)
    return tuple(scattered(x, rows, tokens.shape) for x in found if x is not None)


@ops.uncompiled
def separable_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    slopes: Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]],
    total: Callable[[Tensor, Tensor], Tensor],
    bias: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Return a loss whose derivative at a token depends on that token alone, with gradients, in three matrix products.

    The gradients are computed together with the loss, so one backward pass is possible.

    Args:
        hidden: As in :func:`log_probs_and_entropies`.
        weight: As in :func:`log_probs_and_entropies`.
        tokens: As in :func:`log_probs_and_entropies`.
        slopes: Called for one tile after another with the positions int64 ``[m]`` and their log-probs and entropies;
            returns the derivatives of the loss with respect to both, ``[m]`` each; one may be None for 0. Where both
            are 0, the hidden state does not reach the gradient of the weight.
        total: Called once with all log-probs and entropies, in the shape of ``tokens``; returns the loss, 0-d.
        bias: float ``[V]`` or None.
        settings: As in :func:`log_probs_and_entropies`.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or number is wrong, or on the CPU a token is out of range.
    """
    h, head, tiles, rows = positions(hidden, weight, bias, tokens, None, settings)

    def of_tile(first: int, last: int, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return slopes(rows[first:last], log_probs, entropies)

    def of_all(log_probs: Tensor, entropies: Tensor) -> Tensor:
        return total(scattered(log_probs, rows, tokens.shape), scattered(entropies, rows, tokens.shape))

    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _SeparableLoss.apply(h, head.weight, head.bias, tiles, of_tile, of_all)
    return loss
