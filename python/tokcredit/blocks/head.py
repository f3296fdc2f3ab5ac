"""Log-probs and entropies from hidden states: the output layer of a language model, without its ``(N, V)`` logits.

The logits exist one tile at a time. With ``h`` a hidden state, ``W`` and ``b`` the output layer's weight and bias::

    x = scale * (W @ h + b)
    z = softcap * tanh(x / softcap) / temperature        # x / temperature without softcap
    log_probs = log softmax(z)[token]
    entropies = -sum(p * log(p) for p in softmax(z))

Positions without a token (-1) are taken out before the first product: what their hidden states hold, NaN included,
reaches neither result nor gradient. All products are those of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokcredit import ops
from tokcredit.arguments import FLOATS, INTEGERS, describe, float_tensor, instance, tensor, whole_number

_TILE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True, eq=False)
class Head:
    """The output layer of a language model and how its logits become probabilities.

    Args:
        weight: float ``[V, d]``.
        bias: float ``[V]`` of the same dtype, or None. An id with a bias of -inf has probability 0.
        temperature: Positive; a number, or float ``[N]`` without gradient for one per position.
        softcap: Positive bound of the logits, as in Gemma 2, or None.
        scale: Positive factor of the logits before the softcap, as in Cohere's models.
        vocabulary: Number of ids, at most V; further rows of the weight are padding and are left out. None for V.
        logits_dtype: dtype of a tile of logits: that of the weight or, for a weight in half precision, float32. None
            takes float32 on CUDA and the dtype of the weight on the CPU, where float32 takes a float32 copy of the
            weight.
        tile_bytes: Largest memory for one tile of logits and its gradient; 256 MiB on the CPU and 2 GiB on CUDA if
            None. Gradients of hidden states and weight are not counted.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape is wrong, or a number out of range.
    """

    weight: Tensor
    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    scale: float = 1.0
    vocabulary: int | None = None
    # None stands for a default that depends on the weight, and is replaced by it.
    logits_dtype: torch.dtype = None  # type: ignore[assignment]
    tile_bytes: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if float_tensor("weight", self.weight).dim() != 2:
            raise ValueError(f"weight: expected float [V, d], got {describe(self.weight)}")
        if self.bias is not None:
            tensor("bias", self.bias, (self.weight.dtype,), (self.weight.shape[0],), self.weight.device)
        for name in ("temperature", "softcap", "scale"):
            x = getattr(self, name)
            if name == "temperature" and isinstance(x, Tensor):
                tensor(name, x, FLOATS, (x.numel(),), self.weight.device)
                if x.requires_grad:
                    raise ValueError("temperature: expected a tensor without gradient, got one that requires it")
                if x.is_cpu and not bool((x > 0).all()):
                    raise ValueError(f"temperature: expected positive numbers, got {x[~(x > 0)].tolist()[:4]}")
            elif x is None and name == "softcap":
                continue
            elif isinstance(x, bool) or not isinstance(x, int | float):
                raise TypeError(f"{name}: expected a positive number, got {describe(x)}")
            elif not (x > 0 and math.isfinite(x)):
                raise ValueError(f"{name}: expected a positive number, got {x}")
        ids = self.weight.shape[0] if self.vocabulary is None else whole_number("vocabulary", self.vocabulary)
        if not 0 < ids <= self.weight.shape[0]:
            raise ValueError(f"vocabulary: expected 1 to {self.weight.shape[0]}, the rows of the weight, got {ids}")
        half = self.weight.dtype.itemsize == 2
        dtype = self.logits_dtype or (torch.float32 if half and self.weight.is_cuda else self.weight.dtype)
        if dtype != self.weight.dtype and not (half and dtype == torch.float32):
            allowed = f"{self.weight.dtype}{' or torch.float32' if half else ''}"
            raise TypeError(f"logits_dtype: expected {allowed} for this weight, got {dtype}")
        object.__setattr__(self, "vocabulary", ids)
        object.__setattr__(self, "logits_dtype", dtype)
        own = _TILE_BYTES.get(self.weight.device.type, _TILE_BYTES["cuda"])
        given = own if self.tile_bytes is None else whole_number("tile_bytes", self.tile_bytes, at_least=1)
        object.__setattr__(self, "tile_bytes", given)

    @property
    def in_place(self) -> bool:
        """Whether the gradient of the logits lies over them."""
        return self.logits_dtype == self.weight.dtype

    @property
    def tile_rows(self) -> int:
        """Positions whose logits exist at once. With a softcap its slope lies beside them."""
        assert self.vocabulary is not None
        numbers = self.logits_dtype.itemsize * (1 if self.softcap is None else 2)
        return max(1, self.tile_bytes // (1 if self.in_place else 2) // (numbers * self.vocabulary))

    @property
    def block_rows(self) -> int:
        """Positions whose gradients are multiplied at once: a tile, or several in half of the memory."""
        assert self.vocabulary is not None
        if self.in_place:
            return self.tile_rows
        return max(self.tile_rows, self.tile_bytes // 2 // (self.weight.dtype.itemsize * self.vocabulary))


def _pieces(size: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield ``[first, last)`` of pieces of about equal size, at most ``rows`` each."""
    count = -(-size // rows)
    for k in range(count):
        yield size * k // count, size * (k + 1) // count


class _Tiles:
    """The products of one call.

    Attributes:
        head: The output layer.
        hidden: ``[n, d]``, hidden states of the positions with a token.
        tokens: int64 ``[n]``.
        temperature: ``[n, 1]``, or None where all positions share one.
    """

    def __init__(self, head: Head, hidden: Tensor, tokens: Tensor, temperature: Tensor | None) -> None:
        self.head, self.hidden, self.tokens, self.temperature = head, hidden, tokens, temperature
        self.weight = head.weight.detach()[: head.vocabulary]
        self.bias = None if head.bias is None else head.bias.detach()[: head.vocabulary].to(head.logits_dtype)
        self.common = 1.0 if temperature is not None else float(head.temperature)
        # A cap would make a finite number of the logit of a forbidden id.
        self.forbidden = None if head.softcap is None or self.bias is None else self.bias.isneginf()
        self.idle: Tensor | None = None  # positions without a gradient, whose hidden states must not reach the weight's
        self.widens = not head.in_place and hidden.is_cuda
        self.free()

    def free(self) -> None:
        """Let go of what lives only while tiles are computed."""
        self.memory: Tensor | None = None  # the logits of a tile, one after the other: fresh memory is slow to write
        self.operand: Tensor | None = None

    def logits(self, first: int, last: int, sloped: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return the logits of some positions before the common temperature, and the slope of the softcap or None.

        They lie where those of the tile before lay.

        Args:
            first: First position.
            last: One past the last position.
            sloped: Whether the slope is wanted.
        """
        head, h = self.head, self.hidden[first:last]
        if self.widens:
            z = torch.mm(h, self.weight.t(), out_dtype=head.logits_dtype)
            z = z if self.bias is None else z.add_(self.bias)
        else:
            # Without a product that widens, the operands are widened.
            if self.operand is None:
                self.operand = self.weight.to(head.logits_dtype)
            h = h.to(self.operand.dtype)
            if self.memory is None:
                rows = min(head.tile_rows, self.hidden.shape[0])
                self.memory = self.operand.new_empty(rows, self.operand.shape[0])
            z, transposed = self.memory[: last - first], self.operand.t()
            if self.bias is None:
                torch.mm(h, transposed, out=z)
            else:
                torch.addmm(self.bias, h, transposed, out=z)
        slope = None
        if head.scale != 1:
            z.mul_(head.scale)
        if head.softcap is not None:
            z.div_(head.softcap)
            # 1 - tanh(y) ** 2 without the cancellation near its bounds.
            slope = z.cosh().square_().reciprocal_() if sloped else None
            z.tanh_().mul_(head.softcap)
            if self.forbidden is not None:
                z.masked_fill_(self.forbidden, -math.inf)
        if self.temperature is not None:
            z.div_(self.temperature[first:last])
        return z, slope

    def statistics(self, z: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs, entropies and log-normalizers from logits."""
        return ops.logits_forward(z, self.tokens[first:last], self.common, ops.num_threads())

    def gradient(self, z: Tensor, slope: Tensor | None, first: int, last: int, *sums: Tensor | None) -> Tensor:
        """Return the gradient to the product of hidden states and weight, written over the logits."""
        ops.logits_gradient_(z, self.tokens[first:last], self.common, *sums, ops.num_threads())
        if slope is not None:
            z.mul_(slope)
            if self.idle is not None:
                z.masked_fill_(self.idle[first:last, None], 0)
        if self.temperature is not None:
            z.div_(self.temperature[first:last])
        return z if self.head.scale == 1 else z.mul_(self.head.scale)

    def blocks(self, gradient: Callable[[int, int], Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        """Yield blocks of positions with the gradient of their logits in the dtype of the weight.

        Args:
            gradient: Gives that of the positions ``[first, last)`` of one tile.
        """
        head, memory = self.head, None
        for first, last in _pieces(self.hidden.shape[0], head.block_rows):
            if head.in_place:
                yield first, last, gradient(first, last)
                continue
            if memory is None:
                memory = self.weight.new_empty(min(head.block_rows, self.hidden.shape[0]), self.weight.shape[0])
            for low, high in _pieces(last - first, head.tile_rows):
                memory[low:high].copy_(gradient(first + low, first + high))
            yield first, last, memory[: last - first]


class _Sums:
    """Gradients of hidden states, weight and bias, each or None where it is not wanted."""

    def __init__(self, tiles: _Tiles, wanted: tuple[bool, bool, bool]) -> None:
        head, hidden = tiles.head, tiles.hidden
        self.tiles, wide = tiles, torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        # One block needs no wider sum: it is rounded once.
        whole = hidden.shape[0] <= head.block_rows
        dtype = head.weight.dtype if whole else wide
        self.weight = torch.zeros_like(head.weight, dtype=dtype) if wanted[1] else None
        self.bias = torch.zeros_like(head.weight[:, 0], dtype=wide) if wanted[2] else None

    def add(self, first: int, last: int, gradient: Tensor) -> None:
        """Add the products of a block's gradient.

        Args:
            first: First position of the block.
            last: One past its last position.
            gradient: ``[last - first, vocabulary]``, in the dtype of the weight.
        """
        tiles, ids = self.tiles, gradient.shape[1]
        if self.hidden is not None:
            torch.mm(gradient, tiles.weight, out=self.hidden[first:last])
        if self.weight is not None:
            own, h = self.weight[:ids], tiles.hidden[first:last]
            if tiles.idle is not None:
                h = h.masked_fill(tiles.idle[first:last, None], 0)
            if own.dtype == h.dtype:
                own.addmm_(gradient.t(), h)
            elif h.is_cuda:
                own.add_(torch.mm(gradient.t(), h, out_dtype=own.dtype))
            else:
                own.add_(torch.mm(gradient.t(), h))
        if self.bias is not None:
            self.bias[:ids] += gradient.sum(0, dtype=self.bias.dtype)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the dtypes of hidden states, weight and bias."""
        dtype = self.tiles.head.weight.dtype
        weight, bias = (None if x is None else x.to(dtype) for x in (self.weight, self.bias))
        return self.hidden, weight, bias


def _joined(results: Sequence[tuple[Tensor, ...]], count: int, hidden: Tensor) -> list[Tensor]:
    """Return the results of tiles as one, or ``count`` empty tensors without any tile."""
    if results:
        return [torch.cat(x) for x in zip(*results, strict=True)]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return [hidden.new_empty(0, dtype=dtype)] * count


class _TwoPasses(torch.autograd.Function):
    """Four products: the logits are computed again in the backward pass, only of positions with a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tiles: _Tiles) -> tuple[Tensor, Tensor]:
        pieces = _pieces(hidden.shape[0], tiles.head.tile_rows)
        results = [tiles.statistics(tiles.logits(*at, sloped=False)[0], *at) for at in pieces]
        tiles.free()
        log_probs, entropies, normalizers = _joined(results, 3, hidden)
        ctx.save_for_backward(hidden, weight, bias, entropies, normalizers)
        ctx.tiles = tiles
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        tiles, (hidden, *_, entropies, normalizers) = ctx.tiles, ctx.saved_tensors
        given = [x for x in (grad_log_probs, grad_entropies) if x is not None]
        moves = torch.stack([x != 0 for x in given]).any(0).nonzero()[:, 0] if given else hidden.new_empty(0).long()
        chosen = tiles
        numbers = [normalizers, entropies, grad_log_probs, grad_entropies]
        if moves.numel() < hidden.shape[0]:
            temperature = None if tiles.temperature is None else tiles.temperature[moves]
            chosen = _Tiles(tiles.head, hidden[moves], tiles.tokens[moves], temperature)
            numbers = [None if x is None else x[moves] for x in numbers]
        sums = _Sums(chosen, ctx.needs_input_grad[:3])

        def gradient(first: int, last: int) -> Tensor:
            own = [None if x is None else x[first:last].contiguous() for x in numbers]
            return chosen.gradient(*chosen.logits(first, last), first, last, *own)

        with torch.autocast(hidden.device.type, enabled=False):
            for block in chosen.blocks(gradient):
                sums.add(*block)
        chosen.free()
        of_hidden, of_weight, of_bias = sums.results()
        if of_hidden is not None and chosen is not tiles:
            of_hidden = torch.zeros_like(hidden).index_copy_(0, moves, of_hidden)
        return of_hidden, of_weight, of_bias, None


Slopes = Callable[[int, int, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]
Total = Callable[[Tensor, Tensor], Tensor]


class _OnePass(torch.autograd.Function):
    """Three products: the gradients are computed in the forward pass and multiplied in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tiles: _Tiles, slopes: Slopes, total: Total
    ) -> Tensor:
        sums, results = _Sums(tiles, ctx.needs_input_grad[:3]), []
        tiles.idle = idle = torch.empty(hidden.shape[0], dtype=torch.bool, device=hidden.device)

        def gradient(first: int, last: int) -> Tensor:
            z, slope = tiles.logits(first, last)
            log_probs, entropies, normalizers = tiles.statistics(z, first, last)
            results.append((log_probs, entropies))
            a, e = slopes(first, last, log_probs, entropies)
            given = [x == 0 for x in (a, e) if x is not None]
            idle[first:last] = torch.stack(given).all(0) if given else True
            return tiles.gradient(z, slope, first, last, normalizers, entropies, a, e)

        for block in tiles.blocks(gradient):
            sums.add(*block)
        tiles.free()
        ctx.gradients = sums.results()
        return total(*_joined(results, 2, hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("loss_from_hidden: expected one backward pass, got a second one through the same loss")
        return (*(None if x is None else x.mul_(grad) for x in gradients), None, None, None)


def dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype in which a float tensor enters a matrix product: that of autocast where it is on.

    Args:
        x: A tensor.
    """
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype in FLOATS and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def _positions(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Head, _Tiles, Tensor]:
    """Return the hidden states of positions with a token, the output layer, its tiles, and these positions."""
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
        tensor("rows", rows, (torch.int64,), (rows.numel(),), hidden.device)
        every = False
    h, temperature = hidden.reshape(flat.numel(), hidden.shape[-1]), None
    if isinstance(head.temperature, Tensor):
        if head.temperature.numel() != flat.numel():
            raise ValueError(f"temperature: expected a number or [{flat.numel()}], got {describe(head.temperature)}")
        temperature = head.temperature.detach().reshape(-1)[rows, None]
    if not every:
        h, flat = h.index_select(0, rows), flat.index_select(0, rows)
    h = h.contiguous()
    return h, head, _Tiles(head, h.detach(), flat.long().contiguous(), temperature), rows


def _scattered(x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    return x.new_zeros(math.prod(shape)).index_copy(0, rows, x).view(shape)


def log_probs_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each token and the entropy of its distribution, with gradients.

    The backward pass computes the logits again, tile by tile, and only of positions that have a gradient: four matrix
    products in all. A second derivative is not available. Under autocast, hidden states, weight and bias are cast to
    its dtype.

    Args:
        hidden: float ``(..., d)``, the hidden state from which each token is predicted.
        weight: float ``[V, d]``, the output layer's weight.
        tokens: int32 or int64 ``(...)``; -1 where a position takes no part: its results and gradients are 0.
        bias: float ``[V]`` or None.
        rows: int64, indices into ``tokens.reshape(-1)`` of the positions that take part. None takes all whose token is
            not -1, and on CUDA waits for the device to find them.
        settings: ``temperature``, ``softcap``, ``scale``, ``vocabulary``, ``logits_dtype`` and ``tile_bytes`` of
            :class:`Head`.

    Returns:
        Two tensors ``(...)``: float32, or float64 for float64 hidden states.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or number is wrong, or on the CPU a token is out of range.
    """
    h, head, tiles, rows = _positions(hidden, weight, bias, tokens, rows, settings)
    with torch.autocast(hidden.device.type, enabled=False):
        log_probs, entropies = _TwoPasses.apply(h, head.weight, head.bias, tiles)
    return _scattered(log_probs, rows, tokens.shape), _scattered(entropies, rows, tokens.shape)


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
            returns the derivatives of the loss to both, ``[m]`` each, one of which may be None for 0. Where both are 0,
            the hidden state does not reach the gradient of the weight.
        total: Called once with all log-probs and entropies, in the shape of ``tokens``; returns the loss, 0-d.
        bias: float ``[V]`` or None.
        settings: As in :func:`log_probs_and_entropies`.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or number is wrong, or on the CPU a token is out of range.
    """
    h, head, tiles, rows = _positions(hidden, weight, bias, tokens, None, settings)

    def of_tile(first: int, last: int, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return slopes(rows[first:last], log_probs, entropies)

    def of_all(log_probs: Tensor, entropies: Tensor) -> Tensor:
        return total(_scattered(log_probs, rows, tokens.shape), _scattered(entropies, rows, tokens.shape))

    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _OnePass.apply(h, head.weight, head.bias, tiles, of_tile, of_all)
    return loss
