"""The loss of a student's and a teacher's hidden states: four matrix products, and no logits of the whole batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokcredit.arguments import describe, float_tensor, instance
from tokcredit.blocks.head import OnePass, dtype_of, positions, scattered
from tokcredit.blocks.tiles import Head, Sums, Tiles, joined

Values = Callable[..., Tensor]
Slopes = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Total = Callable[[Tensor, Tensor, Tensor], Tensor]


def _scaled(z: Tensor, tiles: Tiles, first: int, last: int, sloped: bool) -> Tensor | None:
    """Scale and cap logits of a tile, and divide them by their own temperatures; return the slope of the softcap."""
    head, slope = tiles.head, None
    if head.scale != 1:
        z.mul_(head.scale)
    if head.softcap is not None:
        # A cap would make a finite number of the logit of a forbidden id.
        forbidden = z.isneginf()
        z.div_(head.softcap)
        # 1 - tanh(y) ** 2 without the cancellation near its bounds.
        slope = z.cosh().square_().reciprocal_() if sloped else None
        z.tanh_().mul_(head.softcap).masked_fill_(forbidden, -math.inf)
    if tiles.temperature is not None:
        z.div_(tiles.temperature[first:last, None])
    return slope


def _through(z: Tensor, slope: Tensor | None, tiles: Tiles, first: int, last: int) -> Tensor:
    """Return the gradient to the product of hidden states and weight, given that to what :func:`_scaled` made of it."""
    if slope is not None:
        z.mul_(slope)
        if tiles.idle is not None:
            z.masked_fill_(tiles.idle[first:last, None], 0)
    if tiles.temperature is not None:
        z.div_(tiles.temperature[first:last, None])
    z = z if tiles.head.scale == 1 else z.mul_(tiles.head.scale)
    return z.to(tiles.weight.dtype)


class _DistilledLoss(OnePass):
    """Four products, where a gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tiles: Tiles,
        teacher: Tiles,
        values: Values,
        slopes: Callable[[int, int, Tensor, Tensor, Tensor], Tensor],
        total: Total,
    ) -> Tensor:
        results: list[tuple[Tensor, ...]] = []

        def evaluated(first: int, last: int, sloped: bool) -> tuple[Tensor, Tensor | None, Tensor]:
            z, given = tiles.logits(first, last), teacher.logits(first, last)
            found = tiles.statistics(z, first, last)
            slope = _scaled(z, tiles, first, last, sloped)
            _scaled(given, teacher, first, last, False)
            student = z.detach().requires_grad_(sloped)
            with torch.set_grad_enabled(sloped):
                value = values(student, given, tiles.common, overwrite=sloped)
            results.append((value.detach(), found.log_probs, found.entropies))
            return student, slope, value

        if any(ctx.needs_input_grad[:3]):
            sums = Sums(tiles, ctx.needs_input_grad[:3])
            tiles.idle = idle = torch.empty(hidden.shape[0], dtype=torch.bool, device=hidden.device)

            for first, last in tiles.pieces():
                student, slope, value = evaluated(first, last, True)
                given = slopes(first, last, *results[-1])
                idle[first:last] = given == 0
                (z,) = torch.autograd.grad(value, student, given)
                sums.add(first, last, _through(z, slope, tiles, first, last))
            ctx.gradients, ctx.weight = sums.results(), tiles.head.weight
        else:
            for first, last in tiles.pieces():
                evaluated(first, last, False)
        tiles.free()
        teacher.free()
        return total(*joined(results, 3, hidden))


def distilled_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    teacher: tuple[Tensor, Head],
    values: Values,
    slopes: Slopes,
    total: Total,
    bias: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Return a loss of a divergence between student and teacher at each token, with gradients, in four products.

    The loss is any whose derivative at a token depends on that token alone. The gradients are computed together with
    it, so one backward pass is possible. A tile of logits of the student and one of the teacher exist at a time.

    Args:
        hidden: float ``(..., d)``, hidden states of the student.
        weight: float ``[V, d]``, weight of the student's output layer.
        tokens: int32 or int64 ``(...)``, -1 where a position takes no part.
        teacher: Hidden states ``(..., d')`` of the teacher at the same positions, and its output layer, whose
            temperature is 1: that of the student holds for both.
        values: Called for one tile after another with logits of student and teacher ``[m, V]``, the temperature, and
            whether the backward pass may ``overwrite`` the first; returns divergences ``[m]`` with gradient to it.
        slopes: Called for each tile with the positions int64 ``[m]`` and their divergences, log-probs and entropies;
            returns the derivative of the loss to the divergences, ``[m]``.
        total: Called once with all divergences, log-probs and entropies, in the shape of ``tokens``; returns the loss.
        bias: float ``[V]`` or None, of the student's output layer.
        settings: As in :func:`tokcredit.head.log_probs_and_entropies`.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or number is wrong, or the vocabularies differ.
    """
    h, head, tiles, rows = positions(hidden, weight, bias, tokens, None, settings)
    if h.dtype == torch.float16:
        raise TypeError("hidden: expected bfloat16, float32 or float64, got float16, whose gradients need a scaler")
    given, of = teacher
    instance("teacher", of, Head)
    for name, x in (("shard", head), ("teacher", of)):
        if x.shard is not None:
            raise ValueError(f"{name}: expected a whole weight for a divergence, got a shard of {x.shard.sizes}")
    shape = (*tokens.shape, of.weight.shape[1])
    if float_tensor("teacher", given).shape != shape:
        raise ValueError(f"teacher: expected hidden states {list(shape)}, got {describe(given)}")
    if of.vocabulary != head.vocabulary:
        raise ValueError(f"teacher: expected the student's vocabulary of {head.vocabulary}, got {of.vocabulary}")
    if isinstance(of.temperature, Tensor) or of.temperature != 1:
        raise ValueError("teacher: expected a temperature of 1, because that of the student holds for both")
    own = dtype_of(of.weight)
    alike = head.logits_dtype if head.logits_dtype in (own, torch.float32) and own.itemsize < 8 else own
    of_bias = None if of.bias is None else of.bias.to(own)
    of = dataclasses.replace(of, weight=of.weight.to(own), bias=of_bias, logits_dtype=alike)
    # Beside the logits lie the teacher's, the slope of a softcap, and a gradient of another dtype.
    tiles_at_once = 2 + (head.softcap is not None) + (head.logits_dtype != h.dtype)
    head = dataclasses.replace(head, tile_bytes=max(1, head.tile_bytes // tiles_at_once))
    tiles = Tiles(head, tiles.hidden, tiles.tokens, tiles.temperature)
    seen = given.detach().reshape(-1, shape[-1]).index_select(0, rows).to(of.weight.dtype)
    others = Tiles(of, seen, tiles.tokens, tiles.temperature)
    others.rows = tiles.rows

    def of_tile(first: int, last: int, *found: Tensor) -> Tensor:
        return slopes(rows[first:last], *found)

    def of_all(*found: Tensor) -> Tensor:
        return total(*(scattered(x, rows, tokens.shape) for x in found))

    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # autograd would ask for their gradients all the same
        h, weight, bias = h.detach(), weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _DistilledLoss.apply(h, weight, bias, tiles, others, values, of_tile, of_all)
    return loss
