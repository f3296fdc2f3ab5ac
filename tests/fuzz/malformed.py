"""Malformed arguments from hypothesis: tensors of every wrong kind, and objects that are no tensors."""

import math

import torch
from hypothesis import strategies as st

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16),
    *(torch.uint8, torch.bool, torch.complex64),
)
WHOLE = (0, 1, -1, 2, 3, 7, 1 << 31, -(1 << 31), 1 << 62, -(1 << 62))
FRACTIONS = (0.0, 1.0, -1.0, 0.5, -0.5, 1e30, -1e30, 3e38)
SPECIAL = (math.nan, math.inf, -math.inf)


@st.composite
def tensors(draw, size):
    """Any tensor: wrong dtype, shape, device, layout, strides, overlapping memory, negative, huge, empty, NaN."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.sampled_from([(size,), (size + 1,), (max(size - 1, 0),), (0,), (), (1,), (2, size), (size, 1), (3, 0)])
    )
    count = math.prod(shape)
    values = draw(st.lists(st.sampled_from(_pool(dtype)), min_size=count, max_size=count))
    x = torch.tensor(values, dtype=torch.float64 if dtype.is_floating_point else dtype).to(dtype).reshape(shape)
    return draw(st.sampled_from(LAYOUTS))(x)


def _pool(dtype):
    """Numbers that a tensor of this dtype can hold."""
    if dtype.is_floating_point or dtype.is_complex:
        return FRACTIONS + SPECIAL
    if dtype == torch.bool:
        return (False, True)
    limits = torch.iinfo(dtype)
    return tuple(x for x in WHOLE if limits.min <= x <= limits.max)


def _strided(x):
    return x if x.dim() == 0 else torch.stack([x, x], -1)[..., 0]


def _overlapping(x):
    return x if x.dim() == 0 or x.numel() == 0 else x.reshape(-1)[:1].expand(x.shape)


LAYOUTS = (
    *(lambda x: x,) * 6,
    _strided,
    _overlapping,
    lambda x: x.to("meta"),
    lambda x: x.to_sparse() if x.dim() and not x.is_complex() else x,
    lambda x: x.detach().requires_grad_() if x.dtype.is_floating_point else x,
    lambda x: x.T if x.dim() == 2 else x,
)


def anything(size):
    """A malformed tensor, or something that is no tensor."""
    others = st.sampled_from([None, [0, 1], "text", 3, -1, 0.5, math.nan, 1 << 70, object(), True])
    return st.one_of(tensors(size), tensors(size), tensors(size), others)


@st.composite
def changed(draw, x):
    """A well-formed tensor with one or all of its numbers changed, which keeps dtype and shape."""
    x = x.clone()
    if x.numel() == 0:
        return x
    if x.dtype == torch.bool:
        return ~x
    value = draw(st.sampled_from(_pool(x.dtype)))
    if draw(st.booleans()):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    else:
        x = x.flip(0) if draw(st.booleans()) and x.dim() else torch.full_like(x, value)
    return x
