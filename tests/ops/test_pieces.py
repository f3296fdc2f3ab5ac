import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.pieces import pieces as reference
from tokcredit import Spans, ops

pytestmark = pytest.mark.usefixtures("device")


def matches(marks, spans, cut):
    *numbers, offsets = ops.pieces(marks, spans, cut)
    expected, firsts = reference(marks, spans.begin, spans.end, cut)
    assert list(zip(*(x.tolist() for x in numbers), strict=True)) == expected
    assert offsets.tolist() == firsts


@given(ragged.spans(), st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.9, 0, 1]), st.sampled_from(ops.CUTS))
def test_matches_definition(spans, seed, share, cut):
    matches(torch.rand(spans.size, generator=ragged.generator(seed)) < share, spans, cut)


@pytest.mark.parametrize("cut", ops.CUTS)
@pytest.mark.parametrize("share", [0.002, 0.5, 0.998, 1])
@pytest.mark.parametrize("begin", [0, 5])
def test_long_rows(cut, share, begin):
    """Rows of several tiles, which begin and end anywhere, at a tile's end as well."""
    lengths = torch.tensor([513, 512 - begin, 0, 1, 1700, 1024, 31])
    edges = begin + torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    spans = Spans(edges[:-1], edges[1:], int(edges[-1]) + 3)
    matches(torch.rand(spans.size, generator=ragged.generator()) < share, spans, cut)


def test_worked_example():
    marks, spans = torch.tensor([False, True, False, True, True, True]), ragged.packed(4, 2)
    begin, end, row, at, offsets = (x.tolist() for x in ops.pieces(marks, spans, "before"))
    assert (begin, end) == ([0, 1, 3, 4, 4, 5], [1, 3, 4, 4, 5, 6])
    assert (row, at, offsets) == ([0, 0, 0, 1, 1, 1], [-1, 1, 3, -1, 4, 5], [0, 3, 6])
    begin, end, _, at, _ = (x.tolist() for x in ops.pieces(marks, spans, "after"))
    assert (begin, end, at) == ([0, 2, 4, 4, 5, 6], [2, 4, 4, 5, 6, 6], [1, 3, -1, 4, 5, -1])
    begin, end, row, at, offsets = (x.tolist() for x in ops.pieces(marks, spans, "runs"))
    assert (begin, end, row, at, offsets) == ([1, 3, 4], [2, 4, 6], [0, 0, 1], [1, 3, 4], [0, 2, 3])


@pytest.mark.parametrize("cut", ops.CUTS)
def test_no_rows(cut):
    *numbers, offsets = ops.pieces(torch.zeros(3, dtype=torch.bool), Spans(*[torch.tensor([]).long()] * 2, 3), cut)
    assert all(x.numel() == 0 for x in numbers) and offsets.tolist() == [0]


def test_opcheck():
    marks, spans = torch.tensor([False, True, False, True]), ragged.packed(3, 1)
    rows = (marks, spans.begin, spans.end)
    offsets = ops.pieces(marks, spans, "before")[-1]
    torch.library.opcheck(torch.ops.tokcredit.piece_offsets.default, (*rows, 0))
    torch.library.opcheck(torch.ops.tokcredit.pieces.default, (*rows, offsets, 0, int(offsets[-1])))
