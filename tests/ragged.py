"""Ragged batches for property tests: packed or padded spans, with and without masks, from hypothesis."""

import torch
from hypothesis import strategies as st
from tokcredit.ops import Rows


@st.composite
def rows(draw, max_rows=6, max_length=9):
    """Rows and the size of their buffer; empty rows, padding between rows, all-masked rows included."""
    lengths = draw(st.lists(st.integers(0, max_length), min_size=1, max_size=max_rows))
    gaps = draw(st.one_of(st.just([0] * len(lengths)), st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))))
    begin, end, at = [], [], draw(st.integers(0, 2)) if sum(gaps) else 0
    for length, gap in zip(lengths, gaps, strict=True):
        begin.append(at)
        end.append(at + length)
        at += length + gap
    mask = None
    if draw(st.booleans()):
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=at, max_size=at)), dtype=torch.bool)
    return Rows(torch.tensor(begin), torch.tensor(end), mask), at


def values(size, dtype=torch.float64, seed=0):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
