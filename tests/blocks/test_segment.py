import math

import pytest
import ragged
import reference.segment as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import Spans, ops
from tokcredit.blocks import segment

pytestmark = pytest.mark.usefixtures("device")

NAMES = ops.REDUCTIONS


def members(by, size):
    if isinstance(by, Spans):
        spans = zip(by.begin.tolist(), by.end.tolist(), strict=True)
        return [[t for t in range(b, e) if by.mask is None or by.mask[t]] for b, e in spans]
    return [[i for i in range(size) if by.ids[i] == s and (by.mask is None or by.mask[i])] for s in range(by.segments)]


def reduced(name, x, by):
    if name == "count":
        return segment.count(by).to(torch.promote_types(x.dtype, torch.float32))
    y = getattr(segment, name)(x, by)
    return torch.stack(y, 1) if name == "moments" else y


@st.composite
def groupings(draw):
    if draw(st.booleans()):
        spans = draw(ragged.spans())
        return spans, spans.size
    size = draw(st.integers(0, 20))
    count = draw(st.integers(0, 4))
    ids = torch.tensor(draw(st.lists(st.integers(-1, 4), min_size=size, max_size=size)), dtype=torch.int64)
    mask = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
    return segment.Ids(ids, count, None if mask is None else torch.tensor(mask, dtype=torch.bool)), size


@given(groupings(), st.sampled_from(NAMES), st.integers(0, 3))
def test_matches_definition(grouping, name, seed):
    by, size = grouping
    x = ragged.values(size, seed=seed)
    inside = torch.zeros(size, dtype=torch.bool)
    expected = []
    for group in members(by, size):
        inside[group] = True
        expected.append(reference.reduce(name, x[group].tolist()))
    ours = reduced(name, x.masked_fill(~inside, math.nan), by)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64).view_as(ours))


@given(groupings(), st.sampled_from(["sum", "mean", "logsumexp"]))
def test_gradient(grouping, name):
    by, size = grouping
    x = ragged.values(size).requires_grad_()

    def f(x):
        y = getattr(segment, name)(x, by)
        return torch.where(y.isfinite(), y, 0)

    torch.autograd.gradcheck(f, (x,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_long_rows_in_blocks(name, dtype, monkeypatch):
    """A row of several blocks, merged, equals its definition; the number of threads changes no bit."""
    n = 200_000
    x = (ragged.values(n) + 3).to(dtype)
    spans = ragged.packed(10, n - 10)
    results = []
    for threads in (1, 5):
        monkeypatch.setattr(ops.call, "_threads", threads)
        results.append(reduced(name, x, spans))
    assert torch.equal(*results) and results[0].dtype == (torch.float64 if name == "moments" else torch.float32)
    exact = [reference.reduce(name, part.tolist()) for part in (x[:10].double(), x[10:].double())]
    torch.testing.assert_close(results[0].double(), torch.tensor(exact, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_small_spread_about_a_large_mean_keeps_its_digits():
    x = 1e8 + torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    spans = Spans.single(4)
    torch.testing.assert_close(segment.var(x, spans).item(), 5 / 3)
    assert segment.var(x, spans, ddof=4).item() == 0


@pytest.mark.parametrize("size", [7, 200, 70_000])
def test_spread_and_extremes_of_short_and_long_rows(size):
    """Equal numbers have a spread of exactly 0; a first number far from the rest costs no digits; NaN is passed on."""
    mask = torch.arange(size) % 3 != 1
    spans = Spans.single(size, mask=mask)
    x = torch.full((size,), 0.1, dtype=torch.float64).masked_fill(~mask, math.nan)
    assert segment.var(x, spans).item() == 0 and segment.mean(x, spans).item() == pytest.approx(0.1, rel=1e-12)
    x[mask] = ragged.values(int(mask.sum())) + 1e6
    x[0] = -1e6
    torch.testing.assert_close(segment.var(x, spans).item(), x[mask].var().item(), rtol=1e-12, atol=0)
    assert (segment.minimum(x, spans).item(), segment.maximum(x, spans).item()) == (-1e6, x[mask].max().item())
    x[size - 1 - size % 3] = math.nan
    for reduce in (segment.var, segment.minimum, segment.maximum):
        assert mask[size - 1 - size % 3] and reduce(x, spans).isnan().item()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 200, 70_000])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e300, -7.7e-9])
def test_moments_of_equal_numbers_are_exact(size, value):
    x = torch.full((size,), value, dtype=torch.float64)
    for by in (Spans.single(size), segment.Ids(torch.zeros(size, dtype=torch.int64), 1)):
        moments = segment.moments(x, by)
        assert [m.item() for m in moments] == [size, value, 0, value, value]
    assert moments._fields == ops.MOMENTS


def test_moments_of_groups_in_one_operation():
    x = torch.tensor([1.0, 2.0, 4.0, math.nan, 3.0])
    mask = torch.tensor([True, True, True, False, True])
    by = segment.Ids(torch.tensor([1, 0, 1, 0, 1]), 3, mask)
    size, mean, var, low, high = segment.moments(x, by)
    assert (size.tolist(), mean.tolist()) == ([1, 3, 0], [2, pytest.approx(8 / 3), 0])
    assert var.tolist() == [0, pytest.approx(7 / 3), 0]
    assert (low.tolist(), high.tolist()) == ([2, 1, math.inf], [2, 4, -math.inf])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20),
    st.sampled_from(ops.STANDARDS),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_standardized_matches_definition(rows, standard, dtype):
    ids = torch.tensor([g for g, _ in rows], dtype=torch.int64)
    counts = torch.tensor([c for _, c in rows], dtype=torch.bool)
    x = ragged.values(len(rows)).to(dtype)
    moments = segment.moment_table(x, segment.Ids(ids, 4, counts))
    ours = segment.standardize(x, ids, moments, standard, 0.25)
    expected = []
    for value, (g, _) in zip(x.tolist(), rows, strict=True):
        own = [v for v, (h, c) in zip(x.tolist(), rows, strict=True) if h == g and c]
        expected.append(reference.standardize(standard, value, own, 0.25))
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=dtype))


def test_standardized_of_equal_numbers_is_0():
    x = torch.full((7,), 0.1, dtype=torch.float64)
    group = torch.zeros(7, dtype=torch.int64)
    moments = segment.moment_table(x, segment.Ids(group, 1))
    for standard in ("centred", "normalized", "leave_one_out"):
        for epsilon in (1e-6, 0.0):
            assert segment.standardize(x, group, moments, standard, epsilon).tolist() == [0.0] * 7
    assert segment.standardize(x * 0, group, moments, "scaled", 0.0).tolist() == [0.0] * 7
    wide = segment.standardize(x.float(), group, moments, "centred", dtype=torch.float64)
    assert wide.dtype == torch.float64 and wide[0] == torch.tensor(0.1).double() - 0.1
    with pytest.raises(ValueError, match="standard: expected one of centred"):
        segment.standardize(x, group, moments, "ranked")


@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("per_row", [True, False])
def test_linear_functions_of_rows(types, per_row):
    """Rows of several lengths with padding between them; what a token's mask hides is not read."""
    begin, end = torch.tensor([1, 5, 5, 8]), torch.tensor([4, 5, 8, 300])
    x, mask = torch.linspace(-3, 5, 303).to(types[0]), torch.arange(303) % 3 != 1
    x[~mask] = math.nan
    spans = Spans(begin, end, 303, mask)
    factor, shift = torch.tensor([[0.5, math.inf, -3.0, 1.25], [7.0, 0.0, 0.125, -2.0]], dtype=torch.float64)
    if not per_row:
        factor, shift = factor[2], shift[2]
    expected, inside = [0.0] * 303, ops.spread(torch.ones(4, dtype=torch.bool), spans)
    for r, (b, e) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        own = (y.expand(4)[r].item() for y in (factor, shift))
        expected[b:e] = reference.row_affine(x[b:e].tolist(), mask[b:e].tolist(), *own)
    found = ops.row_affine(x, factor, shift, spans, types[1])
    assert found.dtype == types[1] and found.tolist() == torch.tensor(expected, dtype=types[1]).tolist()
    assert ops.row_affine(x, factor, shift, spans).dtype == types[0]
    between = ops.row_between(x, factor, shift, spans, -1.5, 4.0)
    assert between.tolist() == [bool(m) and -1.5 < y < 4 for y, m in zip(expected, inside, strict=True)]
    call = (x, factor, shift, *spans.arrays, 0.0, 0.0, types[1], 1)
    torch.library.opcheck(torch.ops.tokcredit.row_affine.default, call)
    many = torch.linspace(-1, 1, 200_000).to(types[0])
    rows = Spans.from_padded(torch.full((50,), 4_000), 4_000)
    of_rows = torch.linspace(1, 2, 50).double()
    one, two = (
        torch.ops.tokcredit.row_affine(many, of_rows, -of_rows, *rows.arrays, 0, 0, types[1], n) for n in (1, 2)
    )
    assert torch.equal(one, two)


def test_infinities_in_logsumexp():
    spans = ragged.packed(2, 2)
    x = torch.tensor([-math.inf, 1.0, -math.inf, -math.inf])
    assert segment.logsumexp(x, spans).tolist() == [1.0, -math.inf]
    x.requires_grad_()
    segment.logsumexp(x, spans).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0, 0.0]
    x = torch.tensor([math.inf, 1.0, -3e38, 3e38, math.nan, math.inf])
    assert segment.logsumexp(x, ragged.packed(2, 2, 2)).tolist() == pytest.approx(
        [math.inf, 3e38, math.nan], nan_ok=True
    )


def test_opcheck_and_compile():
    x = ragged.values(6)
    spans = ragged.packed(2, 4, mask=torch.tensor([True, False] * 3))
    torch.library.opcheck(torch.ops.tokcredit.segment_rows.default, (x, *spans.arrays, 1, 0.0, 1))
    call = (x, torch.zeros(6, dtype=torch.int64), segment.moment_table(x, Spans.single(6)), 1, 1e-6, torch.float32)
    torch.library.opcheck(torch.ops.tokcredit.standardize.default, call)
    ids = torch.tensor([0, 1, 1, 0, 2, -1])
    torch.library.opcheck(torch.ops.tokcredit.segment_ids.default, (x, ids, None, 3, 2, 1.0))

    def f(x):
        return (segment.mean(x, spans) * segment.logsumexp(x, spans)).sum()

    x.requires_grad_()
    (eager,) = torch.autograd.grad(f(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)


def test_rejects_wrong_arguments():
    with pytest.raises(ValueError, match=r"x: expected \[2\], got float32 \[3\]"):
        segment.sum(torch.ones(3), segment.Ids(torch.zeros(2, dtype=torch.long), 1))
    with pytest.raises(TypeError, match=r"ids: expected int64 \[3\], got int32 \[3\]"):
        segment.sum(torch.ones(3), segment.Ids(torch.zeros(3, dtype=torch.int32), 1))
    with pytest.raises(TypeError, match=r"by: expected Spans, Groups or segment\.Ids, got Tensor"):
        segment.sum(torch.ones(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="x: expected \\[3\\], got list"):
        segment.mean([1.0, 2.0, 3.0], Spans.single(3))


@given(ragged.spans(), st.integers(0, 5), st.booleans())
def test_pieces(spans, seed, after):
    """Walk each row and open a new piece at, or after, every marked token."""
    marks = torch.rand(spans.size, generator=ragged.generator(seed)) < 0.4
    marks &= ops.spread(torch.ones_like(spans.begin, dtype=torch.bool), spans)
    cut = segment.pieces(marks, spans, after)
    expected, first, piece = [-1] * spans.size, [], 0
    for b, e in zip(spans.begin.tolist(), spans.end.tolist(), strict=True):
        first.append(piece)
        for t in range(b, e):
            if spans.mask is not None and not spans.mask[t]:
                continue
            piece += bool(marks[t]) and not after
            expected[t] = piece
            piece += bool(marks[t]) and after
        piece += 1
    assert ops.spread(torch.arange(piece), cut.spans).tolist() == [max(k, 0) for k in expected]
    assert ops.count(cut.spans).tolist() == [expected.count(k) for k in range(piece)]
    assert cut.offsets.tolist() == [*first, piece]
    # All pieces but the first, or the last, of each row have a mark.
    alone = {(f, n - 1)[after] for f, n in zip(first, [*first[1:], piece], strict=True)}
    assert cut.marked.tolist() == [k not in alone for k in range(piece)]
    taken = cut.take(torch.arange(1, spans.size + 1)).tolist()
    assert [expected[t - 1] for t in taken if t] == [k for k in range(piece) if k not in alone]
    assert all(marks[t - 1] for t in taken if t)


@given(ragged.spans())
def test_runs(spans):
    """A run begins at an unmasked token whose neighbour in the row is masked or missing."""
    cut = segment.runs(spans)
    mask = spans.mask if spans.mask is not None else torch.ones(spans.size, dtype=torch.bool)
    expected = []
    for b, e in zip(spans.begin.tolist(), spans.end.tolist(), strict=True):
        for t in range(b, e):
            if mask[t] and (t == b or not mask[t - 1]):
                expected.append([t, t])
            if mask[t]:
                expected[-1][1] = t + 1
    assert [list(x) for x in zip(cut.spans.begin.tolist(), cut.spans.end.tolist(), strict=True)] == expected
    assert cut.marked.all() and torch.equal(cut.at, cut.spans.begin)
    assert (cut.row < spans.num_rows).all() and cut.offsets[-1] == len(expected)


@given(ragged.spans(), st.integers(0, 5), st.sampled_from([torch.float32, torch.float64]))
def test_weighted_moments(spans, seed, dtype):
    """A whole weight is what repeating the number does, and one of 0 leaves it out."""
    x = ragged.values(spans.size, dtype, seed)
    weights = torch.randint(-1, 4, (spans.size,), generator=ragged.generator(seed))
    x = x.masked_fill(weights <= 0, math.nan)
    expected = [
        reference.reduce("moments", [x[t].item() for t in own for _ in range(max(weights[t], 0))])
        for own in members(spans, spans.size)
    ]
    ours = segment.moment_table(x, spans, weights=weights.double())
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64).view_as(ours))


def test_weighted_moments_by_hand():
    def table(x, weights, **settings):
        return segment.moment_table(torch.tensor(x), Spans.single(len(x)), weights=torch.tensor(weights), **settings)

    assert table([1.0, 3.0], [3.0, 1.0], ddof=0).tolist() == [[4, 1.5, 0.75, 1, 3]]
    assert table([1.0, 3.0], [0.75, 0.25], ddof=0).tolist() == [[1, 1.5, 0.75, 1, 3]]
    equal = table([0.1, 0.1, 0.1], [1e9, 0.3, 7.0])
    assert equal[0, 1] == torch.tensor(0.1).double() and equal[0, 2] == 0
    with pytest.raises(TypeError, match=r"weights: expected None for segment\.Ids"):
        segment.moment_table(torch.ones(2), segment.Ids(torch.tensor([0, 0]), 1), weights=torch.ones(2))
    begin, end = torch.tensor([0]), torch.tensor([2])
    torch.library.opcheck(
        torch.ops.tokcredit.weighted_moments.default, (torch.ones(2), torch.ones(2).double(), begin, end, None, 1.0)
    )


@given(st.lists(st.tuples(st.integers(-1, 3), st.sampled_from([-1, 0, 5, 10**12])), max_size=12))
def test_keys_are_the_segments_of_equal_tuples(pairs):
    """Dense numbers in ascending order of the pairs; a negative id belongs to no segment."""
    columns = [torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1)]
    found = segment.keys(*columns)
    names = sorted({pair for pair in pairs if min(pair) >= 0})
    assert found.segments == len(names) and found.mask is None
    assert found.ids.tolist() == [names.index(pair) if min(pair) >= 0 else -1 for pair in pairs]
    assert segment.count(found).tolist() == [pairs.count(name) for name in names]


def test_keys_of_wrong_ids_are_errors():
    with pytest.raises(ValueError, match="ids: expected at least one tensor of ids, got none"):
        segment.keys()
    with pytest.raises(ValueError, match=r"ids: expected .* \[2\], got int64 \[3\]"):
        segment.keys(torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match="ids: expected int32 or int64"):
        segment.keys(torch.tensor([0.0]))


@pytest.mark.parametrize("per", ["token", "row", "batch", None])
def test_weighted_sum_and_its_gradient(per):
    spans = ragged.packed(3, 2, 1, mask=torch.tensor([True, False, True, True, True, True]))
    weights = {
        "token": torch.arange(6).double() - 2,
        "row": torch.tensor([[2.0], [-0.5], [0.0]], dtype=torch.float64),
        "batch": torch.tensor(0.25, dtype=torch.float64),
        None: None,
    }[per]
    each = {"token": [-2, 0, 0, 1, 2, 3], "row": [2, 0, 2, -0.5, -0.5, 0], "batch": [0.25, 0] + [0.25] * 4}
    each = each.get(per, [1, 0, 1, 1, 1, 1])
    x = ragged.values(6)
    x[1] = math.nan
    x.requires_grad_()
    rows = segment.weighted_sum(x, spans, weights)
    (rows * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    value = [0 if t == 1 else each[t] * x[t].item() for t in range(6)]
    assert rows.tolist() == pytest.approx([sum(value[:3]), sum(value[3:5]), value[5]])
    assert x.grad.tolist() == pytest.approx([a * b for a, b in zip(each, [1, 1, 1, 2, 2, 3], strict=True)])


def test_nan_reaches_the_gradient_of_a_weighted_sum():
    x = torch.tensor([1.0, math.nan, 2.0, math.nan], requires_grad=True)
    spans = ragged.packed(3, 1, mask=torch.tensor([True, True, True, False]))
    rows = segment.weighted_sum(x, spans, torch.full((4,), 0.5))
    rows.sum().backward()
    assert rows[0].isnan() and rows[1] == 0 and x.grad[1].isnan() and x.grad[3] == 0
    assert x.grad[[0, 2]].tolist() == [0.5, 0.5]
