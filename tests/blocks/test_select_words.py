import math

import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import Spans
from tokcredit.blocks import select

pytestmark = pytest.mark.usefixtures("device")


def naive(score, k, rows, words, protected, segments, weights, reduce):
    """The tokens to keep, row by row; ``k`` gives a number from the number of words."""
    kept = set()
    for tokens in rows:
        members = {}
        for t in tokens:
            if words[t] >= 0:
                members.setdefault(words[t], []).append(t)
        members = list(members.values())
        function = {"sum": sum, "max": max, "mean": lambda x: sum(x) / len(x)}[reduce]
        u = [function([score[t] for t in m]) for m in members]
        of = [segments[m[0]] for m in members]
        scaled = []
        for x, s in zip(u, of, strict=True):
            same = [y for y, z in zip(u, of, strict=True) if z == s]
            width = max(same) - min(same)
            scaled.append((x - min(same)) / width if width else 0.0)
        scaled = [x * weights[m[0]] for x, m in zip(scaled, members, strict=True)]
        always = [any(protected[t] for t in m) for m in members]
        wanted = min(max(k(len(members)), sum(always)), len(members))
        ranked = sorted(range(len(members)), key=lambda j: (not always[j], -scaled[j], j))
        kept |= {t for j in ranked[:wanted] for t in members[j]}
    return kept


@given(ragged.spans(), st.sampled_from(["sum", "max", "mean"]), st.sampled_from([0.2, 0.5, 0.8, 1.0]), st.randoms())
def test_against_loops(spans, reduce, share, random):
    size = spans.size
    draw = lambda low, high: [random.randint(low, high) for _ in range(size)]  # noqa: E731
    score, words, segments = [x / 4 for x in draw(-6, 6)], draw(-1, 4), draw(0, 2)
    protected, weights = [x == 0 for x in draw(0, 6)], [x / 2 for x in draw(1, 4)]
    rows = [
        [t for t in range(b, e) if spans.mask is None or bool(spans.mask[t])]
        for b, e in zip(spans.begin.tolist(), spans.end.tolist(), strict=True)
    ]
    found = select.top_share(
        torch.tensor(score, dtype=torch.float64),
        select.Share(share, "nearest"),
        spans,
        torch.tensor(words, dtype=torch.int64),
        torch.tensor(protected, dtype=torch.bool),
        torch.tensor(segments, dtype=torch.int64),
        torch.tensor(weights, dtype=torch.float64),
        reduce,
    )
    expected = naive(
        score, lambda n: max(round(n * share), min(n, 1)), rows, words, protected, segments, weights, reduce
    )
    assert set(found.nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize(("n", "percent", "kept"), [(5, 50, 2), (7, 50, 4), (3, 50, 2), (5, 80, 4), (9, 60, 5)])
def test_golden_counts(n, percent, kept):
    share = select.Share(percent / 100, "nearest")
    assert select.top_share(torch.rand(n), share, Spans.single(n)).sum() == kept


def test_limits():
    score = torch.tensor([0.5, math.nan, 2.0, 0.5, -math.inf])
    five = Spans.single(5)
    assert torch.equal(select.top_share(score, 5, five), torch.ones(5, dtype=torch.bool))
    assert select.top_share(score, 0, five).tolist() == [False] * 5
    # NaN and -inf are last, in the order of their tokens.
    assert select.top_share(score, 4, five).tolist() == [True, True, True, True, False]
    # Equal scores: the first.
    assert select.top_share(torch.ones(5), 2, five).tolist() == [True, True, False, False, False]
    constant = select.top_share(torch.ones(5), 2, five, segments=torch.zeros(5, dtype=torch.int64))
    assert constant.tolist() == [True, True, False, False, False]
    # A protected token counts even where its score is the lowest or +inf is beside it.
    protected = torch.arange(5) == 4
    assert select.top_share(score, 1, five, protected=protected).tolist() == [False] * 4 + [True]
    infinite = torch.tensor([math.inf, 0.0, 0.0, 0.0, math.nan])
    assert select.top_share(infinite, 2, five, protected=protected).tolist() == [True, False, False, False, True]
    # Fewer are asked for than are protected.
    assert select.top_share(score, 0, five, protected=protected).tolist() == [False] * 4 + [True]
    for none in (ragged.packed(0), ragged.packed(0, 0), ragged.packed(3, mask=torch.zeros(3, dtype=torch.bool))):
        assert not select.top_share(torch.ones(none.size), 2, none).any()


def test_refusals():
    five, score = Spans.single(5), torch.ones(5)
    for wrong in (
        {"score": score[:4]},
        {"words": torch.ones(5)},
        {"words": torch.ones(4, dtype=torch.int64)},
        {"protected": torch.ones(5)},
        {"segments": torch.ones(5)},
        {"segment_weights": torch.ones(4)},
        {"reduce": "median"},
        {"k": select.Share(2.0)},
    ):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))}: expected"):
            select.top_share(**{"score": score, "k": 2, "spans": five, **wrong})
