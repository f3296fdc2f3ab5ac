import math

import pytest
import ragged
import reference.select as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import Spans, ops
from tokcredit.blocks import select
from tokcredit.blocks.segment import Ids

pytestmark = pytest.mark.usefixtures("device")

FEW = [0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan]


@st.composite
def problems(draw):
    """Values with many ties, in scopes of one row each, of several interleaved rows, or of all."""
    spans = draw(ragged.spans())
    x = torch.tensor(
        draw(st.lists(st.sampled_from(FEW), min_size=spans.size, max_size=spans.size)), dtype=torch.float64
    )
    count = spans.num_rows
    by = draw(st.sampled_from(["row", "ids", "all"]))
    if by == "row":
        return x, spans, None, list(range(count)), count
    ids = draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count)) if by == "ids" else [0] * count
    return x, spans, Ids(torch.tensor(ids), 3 if by == "ids" else 1), ids, 3 if by == "ids" else 1


def members(spans, ids, scopes):
    rows = list(zip(spans.begin.tolist(), spans.end.tolist(), ids, strict=True))
    inside = lambda t: spans.mask is None or bool(spans.mask[t])  # noqa: E731
    return [[t for b, e, g in rows if g == s for t in range(b, e) if inside(t)] for s in range(scopes)]


@given(problems(), st.integers(-1, 12), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_top_k(problem, k, dtype):
    x, spans, by, ids, scopes = problem
    chosen = select.top_k(x.to(dtype), k, spans, by)
    expected = set()
    for tokens in members(spans, ids, scopes):
        expected |= {tokens[i] for i in reference.top_k([x[t].item() for t in tokens], k)}
    assert set(chosen.nonzero()[:, 0].tolist()) == expected


@given(problems(), st.integers(-1, 12))
def test_kth(problem, rank):
    x, spans, by, ids, scopes = problem
    ours = select.kth(x, rank, spans, by)
    expected = [reference.kth([x[t].item() for t in tokens], rank) for tokens in members(spans, ids, scopes)]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)
    assert select.sizes(spans, by).tolist() == [len(tokens) for tokens in members(spans, ids, scopes)]


@given(ragged.spans(), st.floats(0, 1))
def test_quantiles(spans, q):
    x = ragged.values(spans.size)
    linear, nearest = select.quantile(x, q, spans), select.quantile_nearest(x, q, spans)
    for r, tokens in enumerate(members(spans, range(spans.num_rows), spans.num_rows)):
        if tokens:
            torch.testing.assert_close(linear[r], torch.quantile(x[tokens], q))
            assert nearest[r] == x[tokens].sort().values[round(q * (len(tokens) - 1))]
        else:
            assert linear[r].isnan() and nearest[r].isnan()


def test_k_per_scope_and_worked_example():
    x = torch.tensor([3.0, 1.0, 3.0, 2.0])
    one = Spans.single(4)
    assert select.top_k(x, 2, one).tolist() == [True, False, True, False]
    assert select.top_k(x, 1, one).tolist() == [True, False, False, False]
    assert select.kth(x, 1, one).tolist() == [2.0]
    two = ragged.packed(2, 2)
    assert select.top_k(x, torch.tensor([0, 1]), two).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("share", "numbers"),
    [
        (select.Share(0.7), [7, 4]),  # 7.000000000000001 of 10
        (select.Share(0.3, "down"), [3, 1]),
        (select.Share(0.5, "nearest"), [5, 2]),  # 2.5 of 5
        (select.Share(0.0, least=2), [2, 2]),
        (select.Share(0.0, least=0), [0, 0]),
        (select.Share(1.0, "down"), [10, 5]),
    ],
)
def test_a_share_of_each_scope(share, numbers):
    mask = torch.arange(22) != 5
    spans = ragged.packed(6, 5, 5, 6, mask=mask)  # of the first row 5 tokens compete
    scope = torch.tensor([0, 1, 0, -1])
    x = ragged.values(22)
    by = Ids(scope, 2)
    assert torch.equal(select.top_k(x, share, spans, by), select.top_k(x, torch.tensor(numbers), spans, by))
    rows = torch.tensor([0] * 10 + [1] * 5 + [-1] * 7)
    picked = select.maximum_variance(x, share, Ids(rows, 2))
    assert [int(picked[rows == g].sum()) for g in (0, 1)] == numbers
    one = ragged.packed(10)
    assert int(select.top_k(x[:10], share, one, select.everything(one)).sum()) == numbers[0]


def test_a_share_that_is_none_is_refused():
    spans = ragged.packed(4)
    for share in (select.Share(1.5), select.Share(float("nan")), select.Share(0.5, "sideways")):
        with pytest.raises(ValueError, match="k: expected"):
            select.top_k(ragged.values(4), share, spans)
    with pytest.raises(ValueError, match="k: least: expected at least 0"):
        select.top_k(ragged.values(4), select.Share(0.5, least=-1), spans)


def test_above_the_size_torch_refuses(monkeypatch):
    n = 2**24 + 5
    x = torch.randperm(n, generator=ragged.generator(0)).float()
    spans = ragged.packed(n // 3, n - n // 3)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.8)
    exact = x.sort().values
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(ops.call, "_threads", threads)
        results.append(select.top_k(x, 1000, spans, select.everything(spans)))
        assert select.quantile_nearest(x, 0.8, spans, select.everything(spans)) == exact[round(0.8 * (n - 1))]
    assert torch.equal(*results) and results[0].sum() == 1000
    assert x[results[0]].min() == exact[-1000]


@given(
    st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=8),
    st.integers(1, 8),
    st.booleans(),
)
def test_maximum_variance(values, k, grouped):
    x = torch.tensor(values, dtype=torch.float64)
    if grouped:
        x = torch.cat([x, x.flip(0)])
    ids = torch.arange(len(x)) // len(values)
    chosen = select.maximum_variance(x, k, Ids(ids, 2) if grouped else None)
    for g in range(1 + grouped):
        picked = x[(ids == g) & chosen].tolist()
        assert len(picked) == min(k, len(values))
        best = reference.most_varied(values, len(picked))
        assert reference.variance(picked) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("size", [0, 1, 40, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_within_mean(size, dtype):
    generator = ragged.generator(size)
    mask = torch.rand(size + 3, generator=generator) < 0.7
    spans = Spans(torch.tensor([0, size // 3 + 1]), torch.tensor([size // 3, size + 1]), size + 3, mask)
    # Multiples of 1/8, so that sums are exact and ties are many.
    x = (torch.randn(size + 3, generator=generator) * 8).round().div(8).square().to(dtype)
    x[::7], x[3::50] = math.nan, math.inf
    tokens = [t for b, e in zip(spans.begin, spans.end, strict=True) for t in range(b, e) if mask[t]]
    for budget, least in ((0.3, 0), (0.0, 0), (-1.0, 3), (math.inf, 0), (0.02, 5), (-1.0, size)):
        chosen = reference.within_mean([x[t].item() for t in tokens], budget, least)
        found = select.within_mean(x, budget, spans, least)
        assert found.nonzero()[:, 0].tolist() == sorted(tokens[i] for i in chosen)
    if size == 40:
        torch.library.opcheck(torch.ops.tokcredit.within_mean.default, (x.float(), *spans.arrays, 0.3, 1))


def test_within_mean_takes_values_of_any_size():
    x = torch.cat([torch.logspace(-12, 3, 5000, dtype=torch.float64), torch.full((5000,), 1e-3, dtype=torch.float64)])
    x = x[torch.randperm(10_000, generator=ragged.generator(1))]
    for values in (x, x.float()):
        ordered = values.double().sort().values
        above = ordered.cumsum(0) / torch.arange(1, 10_001) > 0.5
        found = select.within_mean(values, 0.5, ragged.packed(4_000, 6_000))
        assert int(found.sum()) == 10_000 - int(above.sum()) < 10_000
        assert values[found].max() < values[~found].min()


def test_the_largest_win_a_tie_if_preferred():
    x = torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 1.0])
    assert select.maximum_variance(x[:4], 3).tolist() == [False, True, True, True]
    assert select.maximum_variance(x[:4], 3, prefer_largest=True).tolist() == [True, True, True, False]
    # {2, 0} has no rival.
    for prefer in (False, True):
        assert sorted(x[select.maximum_variance(x, 2, prefer_largest=prefer)].tolist()) == [0.0, 2.0]


def test_maximum_variance_by_hand():
    x = torch.tensor([1.5, 0.5, 0.4, 0.3, -0.2, -2.5])
    assert x[select.maximum_variance(x, 3)].tolist() == pytest.approx([1.5, 0.5, -2.5])
    assert select.maximum_variance(x, 9).all() and not select.maximum_variance(x, 0).any()


def test_opcheck_and_compile():
    x = ragged.values(6)
    spans = ragged.packed(2, 4, mask=torch.tensor([True, False, True] * 2))
    for ranks in (False, True):
        call = (x, *spans.arrays, torch.tensor([0, 0]), torch.tensor([2]), 1, 0.0, 0, 0, ranks, 1)
        torch.library.opcheck(torch.ops.tokcredit.select.default, call)
    ids = torch.tensor([0, 0, 1, 1, 0, 1])
    torch.library.opcheck(
        torch.ops.tokcredit.maximum_variance.default, (x, ids, torch.tensor([2, 1]), 2, 0.0, 0, 0, True)
    )

    def f(x):
        return select.top_k(x, 1, spans), select.quantile(x, 0.5, spans)

    for ours, compiled in zip(f(x), torch.compile(f, fullgraph=True, backend="aot_eager")(x), strict=True):
        torch.testing.assert_close(compiled, ours)


def test_nothing_to_select_from():
    none = torch.zeros(0, dtype=torch.long)
    spans, padding = Spans(none, none, 3), torch.ones(3)
    for by in (None, select.everything(spans), Ids(none, 0)):
        assert not select.top_k(padding, 2, spans, by).any()
        assert select.kth(padding, 0, spans, by).isnan().all()


def test_rejects_wrong_arguments():
    spans = Spans.single(3)
    x = torch.zeros(3)
    with pytest.raises(TypeError, match="k: expected integers, got float32"):
        select.top_k(x, 1.5, spans)
    with pytest.raises(ValueError, match=r"k: expected one number or \[1\], got \[2\]"):
        select.top_k(x, torch.tensor([1, 2]), spans)
    with pytest.raises(ValueError, match=r"q: expected a number from 0 to 1, got 1\.5"):
        select.quantile(x, 1.5, spans)
    with pytest.raises(ValueError, match=r"by\.ids: expected int64 \[1\], got int64 \[2\]"):
        select.top_k(x, 1, spans, Ids(torch.tensor([0, 0]), 1))


@pytest.mark.parametrize("distinct", [2, 1000, 1e6])
def test_rows_of_some_thousand_tokens(distinct):
    """Each row is a scope: its keys are taken out, and become ever fewer digit by digit."""
    size, rows = 5_000, 3
    x = (ragged.values(rows * size) * distinct).round() / distinct
    mask = ragged.values(rows * size, seed=1) > -1
    begin = torch.arange(rows) * size
    k = torch.tensor([1, 700, 4_990])
    chosen = select.top_k(x, k, Spans(begin, begin + size, rows * size, mask)).view(rows, size)
    for r in range(rows):
        tokens = mask.view(rows, size)[r].nonzero()[:, 0]
        order = tokens[x.view(rows, size)[r, tokens].argsort(descending=True, stable=True)]
        assert set(chosen[r].nonzero()[:, 0].tolist()) == set(order[: k[r]].tolist())


@pytest.mark.parametrize("distinct", [3, 1_000, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_tokens(dtype, distinct):
    """More than are sorted out at once, so the threshold is found digit by digit: in long ties, and among few."""
    size, k = 150_000, 30_001
    x = (ragged.values(size) * distinct).round().to(dtype) / distinct
    x[::1000] = math.nan
    mask = ragged.values(size, seed=1) > -1
    spans = ragged.packed(*[50_000] * 3, mask=mask)
    tokens = mask.nonzero()[:, 0]
    order = tokens[x[tokens].argsort(descending=True, stable=True)]
    wanted = (torch.zeros(3, dtype=torch.int64), torch.tensor([k]), 1, 0.0, 0, 0)
    chosen = torch.ops.tokcredit.select(x, *spans.arrays, *wanted, False, 1)
    assert torch.equal(chosen.nonzero()[:, 0], order[:k].sort().values)
    many = torch.ops.tokcredit.select(x, *spans.arrays, *wanted, False, 5)
    assert torch.equal(chosen, many)
    for rank in (0, k, len(order) - 200):
        ours = select.kth(x, rank, spans, select.everything(spans))
        torch.testing.assert_close(ours[0], x[order[-1 - rank]], rtol=0, atol=0, equal_nan=True)


def _large():
    """More tokens than a sample is taken of, in which it tells about where a rank lies, or misleads."""
    n = 20_000
    x = ragged.values(n)
    periodic = torch.arange(n) % 39 == 19  # where every so many-th token lies
    return {
        "normal": x,
        "equal": torch.ones(n, dtype=torch.float64),
        "ties": x.mul(3).round(),
        "sorted": x.sort().values,
        "periodic": torch.where(periodic, x + 100, x),
        "almost equal": torch.where(x > 2.5, x, 0),
        "special": x.masked_fill(x > 2, math.nan).masked_fill(x < -2, -math.inf),
    }


@pytest.mark.parametrize("kind", _large())
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_scopes(kind, masked, dtype):
    x = _large()[kind].to(torch.get_default_device()).to(dtype)
    mask = ragged.values(len(x), seed=1) < 0.5 if masked else None
    spans = ragged.packed(7000, 0, 13_000, mask=mask)
    keys = x.double() if mask is None else x.double()[mask]
    order = keys.sort().values  # NaN last
    count = len(order)
    for rank in (0, 1, count // 5, count // 2, count - 2, count - 1):
        got = select.kth(x, rank, spans, select.everything(spans)).double()
        assert torch.equal(got, order[rank : rank + 1]) or (got.isnan().all() and order[rank].isnan())
        chosen = select.top_k(x, rank + 1, spans, select.everything(spans))
        assert chosen.sum() == rank + 1
        above = x.double()[chosen].sort().values
        torch.testing.assert_close(above, order[count - rank - 1 :], rtol=0, atol=0, equal_nan=True)
    assert select.kth(x, count, spans, select.everything(spans)).isnan().all()
