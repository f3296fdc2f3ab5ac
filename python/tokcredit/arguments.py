"""Arguments that are tensors, checked once: errors name the argument, what was expected and what was found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(x: Any) -> str:
    """Dtype and shape of a tensor, or the type of anything else."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else repr(type(x).__name__)


def tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """x, which must be a tensor of one of the dtypes, of this shape, on this device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected torch.Tensor, got {type(x).__name__}")
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {names} {list(shape)}, got {describe(x)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected {names} {list(shape)}, got {describe(x)}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, the one of tokens, got {x.device}")
    return x


def row_indices(rows: Tensor, count: int, device: torch.device) -> Tensor:
    """Row numbers from row numbers or a row mask, checked against ``count``."""
    rows = torch.as_tensor(rows, device=device)
    if rows.dtype == torch.bool:
        if tuple(rows.shape) != (count,):
            raise ValueError(f"rows: expected bool [{count}], got {describe(rows)}")
        return rows.nonzero().squeeze(1)
    if rows.dim() != 1 or rows.dtype.is_floating_point:
        raise ValueError(f"rows: expected integers [M] or bool [{count}], got {describe(rows)}")
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= count):
        raise ValueError(f"rows: expected numbers from 0 to {count - 1}, got {int(rows.min())} to {int(rows.max())}")
    return rows.long()
