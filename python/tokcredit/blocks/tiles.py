"""The output layer of a language model in tiles: logits of some positions at a time, and the products with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import FLOATS, constant, describe, float_tensor, instance, tensor, whole_number
from tokcredit.blocks.main_grad import main_grad, replaced
from tokcredit.blocks.shard import Shard

_TILE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True, eq=False)
class Head:
    """The output layer of a language model and how its logits become probabilities.

    Args:
        weight: float ``[V, d]``.
        bias: float ``[V]`` of the same dtype, or None. An id with a bias of -inf has probability 0.
        temperature: Positive; a number, or float ``[N]`` without gradient for one per position.
        softcap: Bound of the logits, as in Gemma 2, or None. Itself and divided by the scale from 1e-20 to 1e20: a
            larger one has no effect on logits, and float32 could not hold its numbers.
        scale: Positive factor of the logits before the softcap, as in Cohere's models.
        vocabulary: Number of ids, at most V; further rows of the weight are padding and are left out. None for V.
        logits_dtype: dtype of a tile of logits: that of the weight or, for a weight in half precision, float32. None
            takes float32 on CUDA and the dtype of the weight on the CPU, where float32 needs a float32 copy of the
            weight.
        tile_bytes: Largest number of bytes of one tile of logits; their gradient is written over them. None takes
            256 MiB on the CPU and 2 GiB on CUDA. Gradients of hidden states and weight are not counted.
        shard: For a layer whose rows are divided among processes: which of them ``weight`` and ``bias`` have.
            ``vocabulary`` and all ids then refer to the whole layer. None for a layer that is not divided.

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
    shard: Shard | None = None

    def __post_init__(self) -> None:
        if float_tensor("weight", self.weight).dim() != 2:
            raise ValueError(f"weight: expected float [V, d], got {describe(self.weight)}")
        if self.bias is not None:
            tensor("bias", self.bias, (self.weight.dtype,), (self.weight.shape[0],), self.weight.device)
        for name in ("temperature", "softcap", "scale"):
            x = getattr(self, name)
            if name == "temperature" and isinstance(x, Tensor):
                constant(name, tensor(name, x, FLOATS, (x.numel(),), self.weight.device))
                if x.is_cpu and not bool((x > 0).all()):
                    raise ValueError(f"temperature: expected positive numbers, got {x[~(x > 0)].tolist()[:4]}")
            elif x is None and name == "softcap":
                continue
            elif isinstance(x, bool) or not isinstance(x, int | float):
                raise TypeError(f"{name}: expected a positive number, got {describe(x)}")
            elif not (x > 0 and math.isfinite(x)):
                raise ValueError(f"{name}: expected a positive number, got {x}")
        low, high = 1e-20 * max(self.scale, 1), 1e20 * min(self.scale, 1)
        if self.softcap is not None and not low <= self.softcap <= high:
            raise ValueError(f"softcap: expected None or {low:g} to {high:g} at this scale, got {self.softcap:g}")
        rows = self.weight.shape[0]
        if self.shard is not None:
            sizes, own = instance("shard", self.shard, Shard).sizes, self.shard.rank
            if sizes[own] != rows:
                raise ValueError(f"shard: expected {rows} rows of the weight in process {own}, got {sizes}")
            rows = sum(sizes)
        ids = rows if self.vocabulary is None else whole_number("vocabulary", self.vocabulary)
        if not 0 < ids <= rows:
            raise ValueError(f"vocabulary: expected 1 to {rows}, the rows of the weight, got {ids}")
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
    def ids(self) -> int:
        """Ids whose logits this process computes."""
        assert self.vocabulary is not None
        return self.vocabulary if self.shard is None else self.shard.ids(self.vocabulary)

    @property
    def tile_rows(self) -> int:
        """Positions whose logits exist at once; their gradient lies over them."""
        assert self.vocabulary is not None
        most = self.vocabulary if self.shard is None else self.shard.most_ids(self.vocabulary)
        return max(1, self.tile_bytes // (self.logits_dtype.itemsize * most))


def pieces(size: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield ``[first, last)`` of pieces of about equal size, at most ``rows`` each.

    Args:
        size: Sum of the sizes.
        rows: Largest size of a piece.
    """
    count = -(-size // rows)
    for k in range(count):
        yield size * k // count, size * (k + 1) // count


class Tiles:
    """The products of one call.

    Attributes:
        head: The output layer.
        hidden: ``[n, d]``, hidden states of the positions with a token.
        tokens: int64 ``[n]``.
        temperature: ``[n]``, or None where all positions share one.
        chosen: int64 ``[n, K]``, further ids whose log-probs are wanted, or None.
        rows: Largest number of positions of a tile.
    """

    def __init__(
        self, head: Head, hidden: Tensor, tokens: Tensor, temperature: Tensor | None, chosen: Tensor | None = None
    ) -> None:
        self.head, self.hidden, self.tokens, self.chosen = head, hidden, tokens, chosen
        wide = ops.accumulated(head.logits_dtype)
        self.temperature = None if temperature is None else temperature.to(wide)
        self.weight = head.weight.detach()[: head.ids]
        self.bias = None if head.bias is None else head.bias.detach()[: head.ids].to(head.logits_dtype)
        self.rows = head.tile_rows
        self.common = 1.0 if temperature is not None else float(head.temperature)
        self.idle: Tensor | None = None  # positions without a gradient, whose hidden states must not reach the weight's
        self.widens = hidden.is_cuda and head.logits_dtype != hidden.dtype
        self.free()

    def free(self) -> None:
        """Let go of what lives only while tiles are computed."""
        self.memory: Tensor | None = None  # the logits of a tile, one after the other: fresh memory is slow to write
        self.operand: Tensor | None = None

    def logits(self, first: int, last: int) -> Tensor:
        """Return the logits of some positions, before scale, softcap and temperature.

        They lie where those of the tile before lay.

        Args:
            first: First position.
            last: One past the last position.
        """
        head, h = self.head, self.hidden[first:last]
        if self.widens:
            z = torch.mm(h, self.weight.t(), out_dtype=head.logits_dtype)
            return z if self.bias is None else z.add_(self.bias)
        # Without a product that widens, the operands are widened.
        if self.operand is None:
            self.operand = self.weight.to(head.logits_dtype)
        h = h.to(self.operand.dtype)
        if self.memory is None:
            rows = min(self.rows, self.hidden.shape[0])
            self.memory = self.operand.new_empty(rows, self.operand.shape[0])
        z, transposed = self.memory[: last - first], self.operand.t()
        if self.bias is None:
            return torch.mm(h, transposed, out=z)
        return torch.addmm(self.bias, h, transposed, out=z)

    def settings(self, first: int, last: int) -> ops.LogitRows:
        """Return how the logits of some positions become probabilities, and of which ids.

        Args:
            first: First position.
            last: One past the last position.
        """
        cap = math.inf if self.head.softcap is None else float(self.head.softcap)
        temperature, chosen = (None if x is None else x[first:last] for x in (self.temperature, self.chosen))
        return ops.LogitRows(self.tokens[first:last], self.common, temperature, float(self.head.scale), cap, chosen)

    def statistics(self, z: Tensor, first: int, last: int, squares: bool = False) -> ops.LogitSums:
        """Return log-probs, entropies and log-normalizers from logits.

        Args:
            z: float ``[m, V]``, from :meth:`logits`.
            first: First position.
            last: One past the last position.
            squares: Whether sums of squared probabilities are wanted.
        """
        head, rows = self.head, self.settings(first, last)
        if head.shard is None:
            return ops.logits_forward(z, rows, squares)
        assert head.vocabulary is not None
        return head.shard.statistics(z, rows, head.vocabulary, squares)

    def gradient(
        self,
        z: Tensor,
        first: int,
        last: int,
        sums: ops.LogitSums,
        given: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    ) -> Tensor:
        """Return the gradient to the product of hidden states and weight, written over the logits.

        Args:
            z: float ``[m, V]``, from :meth:`logits`.
            first: First position.
            last: One past the last position.
            sums: From :meth:`statistics`.
            given: Gradients to log-probs, entropies, squares and log-probs of chosen ids, each or None.

        Returns:
            ``[m, V]`` in the dtype of the weight.
        """
        head, first_id = self.head, 0
        assert head.vocabulary is not None
        if head.shard is not None:
            first_id = min(head.shard.first, head.vocabulary)
        rows = self.settings(first, last)
        return ops.logits_gradient_(z, rows, sums, given, first_id, head.vocabulary, self.weight.dtype)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield ``[first, last)`` of each tile."""
        return pieces(self.hidden.shape[0], self.rows)


class Sums:
    """Gradients of hidden states, weight and bias, each or None where it is not wanted.

    Args:
        tiles: The products.
        wanted: Whether each of the three is wanted.
        final: Whether the gradients are those of the backward pass, and that of a weight with ``main_grad`` is added
            there block by block. Otherwise they are multiplied later by the gradient to the loss.
    """

    def __init__(self, tiles: Tiles, wanted: tuple[bool, bool, bool], final: bool = False) -> None:
        head, hidden = tiles.head, tiles.hidden
        self.tiles, wide = tiles, torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.total, self.final = main_grad(head.weight) if wanted[1] else None, final
        if self.total is not None and final:
            self.weight: Tensor | None = self.total
        else:
            # One tile needs no wider sum: it is rounded once, unless it is added to a wider one.
            whole = hidden.shape[0] <= tiles.rows and self.total is None
            dtype = head.weight.dtype if whole else wide
            self.weight = torch.zeros_like(head.weight, dtype=dtype) if wanted[1] else None
        self.bias = torch.zeros_like(head.weight[:, 0], dtype=wide) if wanted[2] else None

    def add(self, first: int, last: int, gradient: Tensor) -> None:
        """Add the products of a tile's gradient.

        Args:
            first: First position of the tile.
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
        """Return what the backward pass gives autograd, or what becomes that after the factor of the loss."""
        head, weight, bias = self.tiles.head, self.weight, self.bias
        if head.shard is not None and self.hidden is not None:
            head.shard.sum_(self.hidden)
        if self.total is not None:
            weight = replaced(head.weight) if self.final else weight
        elif weight is not None:
            weight = weight.to(head.weight.dtype)
        return self.hidden, weight, None if bias is None else bias.to(head.weight.dtype)


def joined(results: Sequence[tuple[Tensor, ...]], count: int, hidden: Tensor) -> list[Tensor]:
    """Return the results of tiles as one, or ``count`` empty tensors without any tile.

    Args:
        results: Results of each tile.
        count: Number of results of a tile.
        hidden: ``[n, d]``, which gives device and dtype of empty results.
    """
    if results:
        return [torch.cat(x) for x in zip(*results, strict=True)]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return [hidden.new_empty(0, dtype=dtype)] * count
