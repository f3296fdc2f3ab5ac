import math

import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import score as reference
from tokcredit import Spans, ops

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.float64]


def tolerance(dtype):
    return {"rel": 1e-4, "abs": 1e-6} if dtype == torch.float32 else {"rel": 1e-9, "abs": 1e-12}


@given(ragged.spans(), st.integers(0, 5), st.sampled_from([0, 0.3, 0.8, 1]), st.booleans(), st.sampled_from(DTYPES))
def test_log_deviation_matches_definition(spans, seed, quantile, positive, dtype):
    x = ragged.values(spans.size, dtype, seed).abs()
    y, statistics = ops.log_deviation(x, spans, quantile, 1e-8, positive)
    expected, numbers = reference.log_deviation(x, *spans.arrays, quantile, 1e-8, positive)
    assert y.dtype == dtype and y.shape == x.shape
    for got, wanted in zip(y.tolist(), expected, strict=True):
        assert wanted is None or got == pytest.approx(wanted, **tolerance(dtype))
    if numbers is not None:
        assert statistics.tolist() == pytest.approx(numbers, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *DTYPES])
def test_log_deviation_of_many_rows(dtype):
    spans = ragged.packed(*range(1, 90), mask=torch.arange(4005) % 5 != 1)
    x = ragged.values(spans.size, dtype).abs()
    x[1::5] = math.nan
    y, statistics = ops.log_deviation(x, spans, 0.8, 1e-8)
    expected, numbers = reference.log_deviation(x, *spans.arrays, 0.8, 1e-8, False)
    live = [t for t in range(spans.size) if expected[t] is not None]
    close = tolerance(torch.float64 if dtype == torch.float64 else torch.float32)
    assert y[live].tolist() == pytest.approx([expected[t] for t in live], **close)
    assert statistics.tolist() == pytest.approx(numbers, **close)
    assert y[live].max() == 1 and y[live].min() == -1


def test_log_deviation_by_hand():
    x = torch.tensor([1.0, math.e, math.e**2, math.e**4], dtype=torch.float64)
    y, statistics = ops.log_deviation(x, ragged.packed(4), 0.5, 1e-8)
    assert y.tolist() == pytest.approx([-1, -0.5, 0, 1])
    assert statistics.tolist() == pytest.approx([2, 1.5, -2 / 1.5, 2 / 1.5])
    assert ops.log_deviation(x, ragged.packed(4), 0.5, 1e-8, True)[0].tolist() == pytest.approx([1, 0.5, 0, 1])
    equal = torch.full((3,), 0.25)
    assert ops.log_deviation(equal, ragged.packed(1, 2), 0.8, 1e-8)[0].tolist() == [0, 0, 0]


def test_nan_at_a_token_that_counts_is_seen():
    x = torch.tensor([1.0, math.nan, 2.0])
    assert ops.log_deviation(x, ragged.packed(3), 0.5, 1e-8)[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high", "widen"), [(0.2, 0.28, 1), (0, 0, 1), (0.6, 10, 2.5), (1e-5, 1e-4, 0)])
def test_bounds_and_factor_match_definition(dtype, low, high, widen):
    h = torch.cat([ragged.values(500, dtype).clamp(-1, 1), torch.tensor([0.0, -1.0, 1.0], dtype=dtype)])
    below, above = ops.score_bounds(h, low, high, widen)
    expected = [reference.bounds(x, low, high, widen) for x in h.tolist()]
    close = {"rel": 2e-5, "abs": 1e-7} if dtype == torch.float32 else {"rel": 1e-12}
    assert below.tolist() == pytest.approx([b for b, _ in expected], **close)
    assert above.tolist() == pytest.approx([a for _, a in expected], **close)

    # Ratios away from the borders of the inner half, where rounding decides.
    wide = [reference.ranges(x, low, high, widen) for x in h.tolist()]
    place = [(-0.8, -0.2, 0.2, 0.8)[t % 4] for t in range(len(h))]
    moved = [p * (a if p > 0 else min(b, 1.2)) for p, (b, a) in zip(place, wide, strict=True)]
    if low and high:
        log_ratio = torch.tensor([math.log1p(x) for x in moved], dtype=dtype)
        wanted = [
            reference.factor(x, r, b, a, 0.7) for x, r, (b, a) in zip(h.tolist(), log_ratio.tolist(), wide, strict=True)
        ]
        if low > 1e-4:
            assert {x == 1 for x in wanted} == {True, False}
        spans = ragged.packed(300, 203)
        wanted = [x * (2 if t < 300 else -3) for t, x in enumerate(wanted)]
        rows = (torch.tensor([[2.0], [-3.0]], dtype=dtype), spans, 0.7)
        by_ranges = ops.score_factor(h, log_ratio, *rows, (low, high, widen))
        assert by_ranges.tolist() == pytest.approx(wanted, rel=1e-6)
        both = ops.score_factor(h, log_ratio - 0.5, *rows, (low, high, widen), reference=torch.full_like(h, -0.5))
        assert both.tolist() == pytest.approx(wanted, rel=1e-6)
        if low <= 0.2:  # bounds at which no ratio is left do not say how wide the range was
            by_bounds = ops.score_factor(h, log_ratio, *rows, bounds=(below, above))
            assert by_bounds.tolist() == pytest.approx(wanted, rel=1e-6)


def test_factor_by_hand():
    h, log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5]), torch.tensor([1.0, 1.2, 1.0, 1.2]).log()
    rows = (torch.full((1, 1), 2.0), ragged.packed(4), 1.0)
    expected = pytest.approx([2, 3, 1, 2])
    assert ops.score_factor(h, log_ratio, *rows, (0.2, 0.2, 0.0)).tolist() == expected
    numbers = (math.log(0.8), math.log(1.2))
    assert ops.score_factor(h, log_ratio, *rows, bounds=numbers).tolist() == expected
    assert ops.score_factor(h, log_ratio, *rows, bounds=(torch.full((4,), numbers[0]), numbers[1])).tolist() == expected
    unbounded = ops.score_factor(h, log_ratio, *rows)
    assert unbounded.tolist() == pytest.approx([2, 2, 1, 1])
    clamped = ops.score_factor(h, log_ratio, *rows, (0.2, 0.2, 0.0), clamp=(0.0, 0.0))
    assert clamped.tolist() == pytest.approx([2, 2, 1, 1])
    gaps = Spans(torch.tensor([1]), torch.tensor([3]), 4)
    assert ops.score_factor(h, log_ratio, rows[0], gaps, 1.0, (0.2, 0.2, 0.0)).tolist() == pytest.approx([0, 3, 1, 0])


def test_bounds_by_hand():
    below, above = ops.score_bounds(torch.tensor([-1.0, 0.0, 1.0, math.nan]), 0.2, 0.2, 1.0)
    assert below.exp().tolist() == pytest.approx([0.6, 0.8, 0.8, math.nan], nan_ok=True)
    assert above.exp().tolist() == pytest.approx([1.2, 1.2, 1.4, math.nan], nan_ok=True)


@pytest.mark.parametrize("high", [1e-6, 0.3, 10, 1e6])
def test_bounds_are_within_two_units_of_the_last_place(high):
    h = torch.linspace(0, 1, 100_001)
    _, above = ops.score_bounds(h, 0.2, high, 1.0)
    exact = torch.log1p((h * torch.tensor(high) + torch.tensor(high)).double())
    unit = torch.exp2(torch.log2(exact).floor() - 23)
    assert ((above - exact).abs() / unit).max() < 2.5  # a kernel adds and multiplies at once


def test_thread_count_does_not_change_bits():
    spans, x = ragged.packed(*[3000] * 100), ragged.values(300_000, torch.float32).abs()
    h = ragged.values(300_000, torch.float32).clamp(-1, 1)
    calls = {
        "log_deviation": (x, *spans.arrays, 0.8, 1e-8, False),
        "score_bounds": (h, 0.2, 0.3, 1.0),
        "score_factor": (h, x, x / 2, h[:100], *spans.arrays[:2], None, None, 0.2, 0.3, 1.0, 1.0, -9.0, 9.0),
    }
    for name, arguments in calls.items():
        op = getattr(torch.ops.tokcredit, name).default
        one, seven = op(*arguments, 1), op(*arguments, 7)
        pairs = zip(one, seven, strict=True) if isinstance(one, tuple) else [(one, seven)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_opcheck():
    spans, h = ragged.packed(3, 1), torch.tensor([-1.0, 0.0, 0.5, 1.0])
    torch.library.opcheck(torch.ops.tokcredit.log_deviation.default, (h.abs(), *spans.arrays, 0.8, 1e-8, False, 1))
    torch.library.opcheck(torch.ops.tokcredit.score_bounds.default, (h, 0.2, 0.3, 1.0, 1))
    rows = (h[:2], *spans.arrays[:2])
    torch.library.opcheck(
        torch.ops.tokcredit.score_factor.default,
        (h, h / 9, None, *rows, h - 2, h + 2, 0.0, 0.0, 0.0, 1.0, -9.0, 9.0, 1),
    )
