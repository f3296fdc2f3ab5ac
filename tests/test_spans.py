"""Spans are the only way to say where rows are, so every malformed one is refused, and no function takes less."""

import pytest
import ragged
import tokcredit as tc
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import Spans
from tokcredit.blocks import log_probs, scan, segment, select, values


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


DISJOINT = r"begin, end: expected ascending, disjoint spans inside \[0, 4\], got "


@pytest.mark.parametrize(
    ("begin", "end", "error", "message"),
    [
        (ints(2, 0), ints(4, 2), ValueError, DISJOINT + r"\[0, 2\) at row 1"),
        (ints(0, 2), ints(3, 4), ValueError, DISJOINT + r"\[2, 4\) at row 1"),
        (ints(0, 10**8), ints(4, 10**8 + 4), ValueError, DISJOINT + r"\[100000000, 100000004\) at row 1"),
        (ints(0), ints(5), ValueError, DISJOINT + r"\[0, 5\) at row 0"),
        (ints(-1), ints(2), ValueError, DISJOINT + r"\[-1, 2\) at row 0"),
        (ints(3), ints(2), ValueError, DISJOINT + r"\[3, 2\) at row 0"),
        (ints(0, 0), ints(4, 4), ValueError, DISJOINT + r"\[0, 4\) at row 1"),
        (ints(2**62), ints(-(2**62)), ValueError, DISJOINT),
        (ints(0), ints(-(2**63)), ValueError, DISJOINT),
        (ints(2**63 - 1), ints(2**63 - 1), ValueError, DISJOINT),
        (ints(0, 1), ints(4), ValueError, r"end: expected int32 or int64 \[2\], got int64 \[1\]"),
        (ints(0)[None], ints(4), ValueError, r"begin: expected int64 \[R\], got int64 \[1, 1\]"),
        (torch.tensor(0), torch.tensor(4), ValueError, r"begin: expected int64 \[R\], got int64 \[\]"),
        (ints(0).float(), ints(4), TypeError, r"begin: expected int32 or int64 \[1\], got float32 \[1\]"),
        (ints(0), ints(4).bool(), TypeError, r"end: expected int32 or int64 \[1\], got bool \[1\]"),
        ([0], [4], ValueError, r"begin: expected int64 \[R\], got list"),
        (ints(0), [4], TypeError, r"end: expected torch\.Tensor, int32 or int64 \[1\], got list"),
        (
            ints(0),
            torch.zeros(1, dtype=torch.int64, device="meta"),
            ValueError,
            "end: expected a tensor on cpu, got one on meta",
        ),
        (ints(0).to_sparse(), ints(4), TypeError, "begin: expected a dense tensor"),
    ],
)
def test_malformed_spans_are_refused(begin, end, error, message):
    with pytest.raises(error, match=message):
        Spans(begin, end, 4)


@pytest.mark.parametrize(
    ("edges", "error", "message"),
    [
        (ints(0, 4, 2), ValueError, r"cu_seqlens: expected ascending offsets from 0, got \[0, 4, 2\]"),
        (ints(1, 4), ValueError, r"cu_seqlens: expected ascending offsets from 0, got \[1, 4\]"),
        (ints(-4, 0), ValueError, r"cu_seqlens: expected ascending offsets from 0, got \[-4, 0\]"),
        (ints(0, 2**63 - 1, -(2**63)), ValueError, "cu_seqlens: expected ascending offsets from 0"),
        (ints(*range(20), 3), ValueError, r"got \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\]"),
        (torch.tensor([[2, 0], [4, 2]]), ValueError, r"cu_seqlens: expected int64 \[R \+ 1\], got int64 \[2, 2\]"),
        (ints(), ValueError, r"cu_seqlens: expected int64 \[R \+ 1\], got int64 \[0\]"),
        (torch.tensor(4), ValueError, r"cu_seqlens: expected int64 \[R \+ 1\], got int64 \[\]"),
        ([0, 4], ValueError, r"cu_seqlens: expected int64 \[R \+ 1\], got list"),
        (torch.tensor([0.0, 4.0]), TypeError, "cu_seqlens: expected int32 or int64"),
        (torch.tensor([False, True]), TypeError, "cu_seqlens: expected int32 or int64"),
    ],
)
def test_malformed_offsets_are_refused(edges, error, message):
    with pytest.raises(error, match=message):
        Spans.from_cu_seqlens(edges)
    with pytest.raises((TypeError, ValueError), match="cu_seqlens: expected"):
        tc.Rollouts(torch.arange(4), edges, ints(0), torch.zeros(1))


@pytest.mark.parametrize(
    ("lengths", "width", "error", "message"),
    [
        (ints(1, 4), 3, ValueError, r"lengths: expected numbers from 0 to 3, got \[1, 4\]"),
        (ints(1, -1), 3, ValueError, r"lengths: expected numbers from 0 to 3, got \[1, -1\]"),
        (ints(1)[None], 3, ValueError, r"lengths: expected int64 \[B\], got int64 \[1, 1\]"),
        ([1], 3, ValueError, r"lengths: expected int64 \[B\], got list"),
        (torch.ones(2), 3, TypeError, "lengths: expected int32 or int64"),
        (ints(1), -3, ValueError, "width: expected at least 0, got -3"),
        (ints(1), 3.0, TypeError, r"width: expected a whole number, got 3\.0"),
    ],
)
def test_malformed_lengths_are_refused(lengths, width, error, message):
    with pytest.raises(error, match=message):
        Spans.from_padded(lengths, width)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(3, dtype=torch.bool), ValueError),
        (torch.ones(4), TypeError),
        ([True] * 4, TypeError),
        (torch.ones(4, dtype=torch.bool, device="meta"), ValueError),
    ],
)
def test_masks_are_checked(mask, error):
    makers = (
        lambda: Spans(ints(0), ints(4), 4, mask),
        lambda: Spans.from_cu_seqlens(ints(0, 4), mask),
        lambda: Spans.from_padded(ints(2, 1), 2, mask),
        lambda: ragged.packed(4).with_mask(mask),
    )
    for make in makers:
        with pytest.raises(error, match="mask: expected"):
            make()


def test_sizes_are_checked():
    for size, error in ((-1, ValueError), (4.0, TypeError), (None, TypeError), (True, TypeError)):
        with pytest.raises(error, match="size: expected"):
            Spans(ints(), ints(), size)


def test_the_three_makers_agree():
    mask = torch.tensor([True, False, True, True, True])
    packed = Spans.from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=torch.int32), mask)
    made = Spans(ints(0, 3, 3), ints(3, 3, 5), 5, mask)
    for name in ("begin", "end", "size", "num_rows", "lengths", "device"):
        a, b = getattr(packed, name), getattr(made, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert packed.begin.dtype == torch.int64 and packed.begin.is_contiguous() and packed.lengths.tolist() == [3, 0, 2]
    padded = Spans.from_padded(ints(3, 0, 2), 4)
    assert (padded.begin.tolist(), padded.end.tolist(), padded.size) == ([0, 4, 8], [3, 4, 10], 12)
    assert Spans.single(5).arrays[:2] == (ints(0), ints(5)) and packed.arrays[2] is mask
    assert Spans.from_padded(ints(), 4).size == 0 and Spans.from_cu_seqlens(ints(0)).num_rows == 0


@given(ragged.spans())
def test_well_formed_spans_are_taken_as_they_are(spans):
    again = Spans(spans.begin.int(), spans.end, spans.size, spans.mask)
    assert torch.equal(again.begin, spans.begin) and torch.equal(again.end, spans.end)
    assert again.with_mask(None).mask is None


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 6), max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 6), max_size=4),
    st.integers(0, 5),
)
def test_spans_are_disjoint_pieces_of_the_buffer_or_an_error(begin, end, size):
    good = len(begin) == len(end)
    last = 0
    for b, e in zip(begin, end, strict=False):
        good = good and last <= b <= e <= size
        last = e
    try:
        spans = Spans(ints(*begin), ints(*end), size)
    except ValueError:
        assert not good
    else:
        assert good and spans.num_rows == len(begin)


def test_changing_the_callers_tensors_is_the_callers_business_only_where_they_are_kept():
    """An int32 tensor is converted, so what was checked cannot change."""
    begin = torch.tensor([0], dtype=torch.int32)
    spans = Spans(begin, torch.tensor([4], dtype=torch.int32), 4)
    begin.fill_(99)
    assert spans.begin.tolist() == [0]


JUNK = (ints(0, 4), (ints(0), ints(4)), None, 4, "spans")


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize(
    "call",
    [
        lambda s: scan.cumulative(torch.ones(4), s),
        lambda s: scan.positions(s),
        lambda s: scan.returns(torch.ones(4), s),
        lambda s: scan.following(torch.ones(4), s),
        lambda s: scan.generalized_advantages(torch.ones(4), torch.ones(4), s),
        lambda s: segment.sum(torch.ones(4), s),
        lambda s: segment.count(s),
        lambda s: segment.pieces(torch.ones(4, dtype=torch.bool), s),
        lambda s: segment.runs(s),
        lambda s: select.top_k(torch.ones(4), 1, s),
        lambda s: select.sizes(s),
        lambda s: select.everything(s),
        lambda s: tc.length.remaining(s),
    ],
)
def test_blocks_take_nothing_but_spans(call, junk):
    with pytest.raises(TypeError, match=r"(spans|by): expected (tokcredit\.)?Spans"):
        call(junk)


@pytest.mark.parametrize("size", [3, 5])
def test_blocks_check_sizes(size):
    spans = Spans.single(4)
    x = torch.ones(size)
    for call in (scan.cumulative, scan.returns, scan.following, segment.sum, segment.mean, segment.maximum):
        with pytest.raises(ValueError, match=rf"expected .*\[4\], got float32 \[{size}\]"):
            call(x, spans)
    with pytest.raises(ValueError, match=rf"score: expected .*\[4\], got float32 \[{size}\]"):
        select.top_k(x, 1, spans)
    with pytest.raises(ValueError, match="marks: expected"):
        segment.pieces(x > 0, spans)


def test_nodes_of_a_forest_are_checked():
    parent, x = ints(-1, 0, 0), torch.ones(2)
    assert values.fold_means(parent, ints(1, 2), x).tolist() == [1.0, 1.0, 1.0]
    for bad_leaf in (ints(1, 3), ints(1, -1), ints(2**40, 0)):
        with pytest.raises(ValueError, match="leaf: expected nodes from 0 to 2"):
            values.fold_means(parent, bad_leaf, x)
    for bad_parent in (ints(-1, 0, 2), ints(-2, 0, 0), ints(-1, 2, 0), ints(2**40, 0, 0)):
        with pytest.raises(ValueError, match="parent: expected -1 or a node before the child"):
            values.fold_means(bad_parent, ints(1, 2), x)


def test_a_row_of_more_than_two_to_the_24_tokens_has_its_exact_length():
    """Counts in float32 end at 2^24."""
    size = 2**24 + 3
    batch = tc.Rollouts(torch.zeros(size, dtype=torch.int32), ints(0, size), ints(0), torch.ones(1))
    assert batch.lengths.tolist() == [size]
    assert segment.count(batch.spans).tolist() == [size] and batch.sizes.tolist() == [size]
    prepared = tc.Objective(tc.credit.constant(), aggregation=tc.aggregation.token_mean()).prepare(batch)
    assert prepared.lengths.tolist() == [size] and prepared.row_weights == 1 / size


def test_logits_and_tokens_are_checked_against_each_other():
    with pytest.raises(ValueError, match=r"tokens: expected the shape of logits without V, \[3\], got \[2\]"):
        log_probs.from_logits(torch.zeros(3, 4), ints(0, 1))
    with pytest.raises(ValueError, match="expected -1 or an id below"):
        log_probs.from_logits(torch.zeros(1, 4), ints(10**12))
