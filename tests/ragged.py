"""Ragged batches for property tests: packed or padded spans, with and without masks, from hypothesis."""

import torch
from hypothesis import strategies as st
from tokcredit import Rollouts, Spans


@st.composite
def spans(draw, max_rows=6, max_length=9):
    """Spans of a buffer; empty rows, padding between rows, all-masked rows included."""
    lengths = draw(st.lists(st.integers(0, max_length), min_size=1, max_size=max_rows))
    gaps = draw(
        st.one_of(
            st.just([0] * len(lengths)),
            st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)),
        )
    )
    begin, end, at = [], [], draw(st.integers(0, 2)) if sum(gaps) else 0
    for length, gap in zip(lengths, gaps, strict=True):
        begin.append(at)
        end.append(at + length)
        at += length + gap
    mask = None
    if draw(st.booleans()):
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=at, max_size=at)), dtype=torch.bool)
    return Spans(torch.tensor(begin, dtype=torch.int64), torch.tensor(end, dtype=torch.int64), at, mask)


def packed(*lengths, mask=None):
    """Spans of rows of these lengths, one after another."""
    return Spans.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), mask)


def generator(seed=0):
    """Random numbers on the device where tensors are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def values(size, dtype=torch.float64, seed=0):
    return torch.randn(size, dtype=torch.float64, generator=generator(seed)).to(dtype)


@st.composite
def grouped(draw, max_rows=9, max_length=6, tokens=2):
    """Sequences over few tokens, so that rows share prefixes, repeat and end inside each other; interleaved groups."""
    sequences = draw(st.lists(st.lists(st.integers(0, tokens - 1), max_size=max_length), min_size=1, max_size=max_rows))
    count = len(sequences)
    groups = draw(st.lists(st.sampled_from([7, -3, 10**12]), min_size=count, max_size=count))
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0]), min_size=count, max_size=count))
    return sequences, groups, rewards


def batch(sequences, groups, rewards, padded=False, mask=None, **per_token):
    """The same rows as a packed or as a padded batch."""
    lengths = [len(s) for s in sequences]
    r = torch.tensor(rewards, dtype=torch.float64)
    g = torch.tensor(groups)
    if not padded:
        flat = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
        return Rollouts(flat, torch.tensor([0, *lengths]).cumsum(0), g, r, mask, **per_token)
    width = max(lengths) + 1
    # Padding repeats a real token: the end of a row must not be told from its id.
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    for row, s in enumerate(sequences):
        tokens[row, : len(s)] = torch.tensor(s, dtype=torch.int64)
    return Rollouts.from_padded(tokens, real, g, r)
