"""Slopes of published methods on one small batch, worked by hand."""

import math

import pytest
import torch
from tokcredit import Spans, ops

pytestmark = pytest.mark.usefixtures("device")

# Two rows, advantages 1 and -1, with a masked token of NaN after each row's second.
MASK = [True, True, False, True, True, True, True, False, True]
ROW_A = {"old": (0.5, 0.05, 0.9, 0.2), "new": (0.55, 0.25, 0.7, 0.2), "engine": (0.45, 0.06, 0.9, 0.25)}
ROW_B = {"old": (0.5, 0.05, 0.9), "new": (0.3, 0.01, 0.97), "engine": (0.5, 0.2, 0.95)}
REFERENCE = (0.4, 0.3, 0.8, 0.1), (0.5, 0.1, 0.6)


def laid_out(a, b):
    a, b, nan = list(a), list(b), [math.nan]
    return torch.tensor(a[:2] + nan + a[2:] + b[:2] + nan + b[2:], dtype=torch.float64)


def log_probs(name):
    return laid_out(ROW_A[name], ROW_B[name]).log()


def run(surrogate, to="old", **settings):
    """Slopes and reported values of the unmasked tokens; values come from rows of one token each."""
    mask = torch.tensor(MASK)
    signs = laid_out([1.0] * 4, [-1.0] * 3)
    current = log_probs("new").requires_grad_()
    edges = torch.tensor([0, 5, 9])
    reference = laid_out(*REFERENCE).log() if to == "reference" else log_probs(to)
    settings = {"reference": reference, "advantages": signs, **settings}
    values, _ = ops.policy_loss(current, Spans.from_cu_seqlens(edges, mask), surrogate, **settings)
    values.sum().backward()
    begin = torch.arange(9)
    singles, _ = ops.policy_loss(current.detach(), Spans(begin, begin + 1, len(begin), mask), surrogate, **settings)
    return current.grad[mask].tolist(), singles[mask].tolist()


def gated(low, high, **settings):
    return run("gated", low=low, high=high, **settings)


def log(x):
    return math.log(x) if x else -math.inf


BOTH = {"both_sides": True}
HELD = {**BOTH, "outside_low": 1, "outside_high": 1}
CAP = {"cap": math.log(3)}
SLOPES = {
    "clipped": (lambda: run("clip", low=log(0.8), high=log(1.2)), [-1.1, 0, -0.777778, -1, 0, 0, 1.077778]),
    "cispo": (lambda: gated(log(0), log(3), **HELD), [-1.1, -3, -0.777778, -1, 0.6, 0.2, 1.077778]),
    "icepop": (
        lambda: gated(log(0.5), log(2), to="engine", **BOTH),
        [-1.222222, 0, -0.777778, -0.8, 0.6, 0, 1.021053],
    ),
    "ce_gppo": (
        lambda: gated(log(0.8), log(1.2), outside_low=0.75, outside_high=0.5),
        [-1.1, -0.6, -0.777778, -1, 0.6, 0.6, 1.077778],
    ),
    "dppo_tv": (
        lambda: gated(-0.15, 0.15, on="probability", **CAP),
        [-1.1, 0, -0.777778, -1, 0, 0.2, 1.077778],
    ),
    "dppo_kl": (
        lambda: gated(-0.1, 0.1, on="binary_kl", **CAP),
        [-1.1, 0, -0.777778, -1, 0.6, 0.2, 1.077778],
    ),
    "ipo": (
        lambda: gated(-0.1, 0.1, on="probability", **BOTH),
        [-1.1, 0, 0, -1, 0, 0.2, 1.077778],
    ),
    "topr": (
        lambda: gated(laid_out([0.0] * 4, [-math.inf] * 3), 0.0, **HELD),
        [-1, -1, -1, -1, 0.6, 0.2, 1],
    ),
}


@pytest.mark.parametrize("method", SLOPES)
def test_slopes(method):
    made, expected = SLOPES[method]
    assert made()[0] == pytest.approx(expected, abs=6e-7)


def test_gmpo():
    """One weight per row, the geometric mean of ratios bounded on the side the advantage pushes; bounds of 0.4."""
    x, mask = (log_probs("new") - log_probs("old")), torch.tensor(MASK)
    bounded = torch.cat([x[:5].clamp(max=0.4), x[5:].clamp(min=-0.4)])
    mean = laid_out([bounded[:5][mask[:5]].mean().item()] * 4, [bounded[5:][mask[5:]].mean().item()] * 3)
    slopes, _ = gated(-0.4, 0.4, on="difference", value="whole", log_ratio=mean)
    a, b = 1.062898, 0.785292
    assert slopes == pytest.approx([-a, 0, -a, -a, 0, 0, b], abs=6e-7)


def test_values_of_a_stopped_token_by_kind():
    """dppo_tv reports 0 for a token that its gate stopped; the score form elsewhere."""
    _, values = gated(-0.15, 0.15, on="probability", **CAP)
    assert values == pytest.approx([0.657621, 0, 0.277414, 1.609438, 0, -0.921034, -0.032828], abs=6e-7)
    _, values = gated(-0.15, 0.15, on="probability", value="ratio", **CAP)
    assert values == pytest.approx([-1.1, 0, -0.777778, -1, 0, 0.2, 1.077778], abs=6e-7)
    _, values = gated(-0.15, 0.15, on="probability", value="whole", **CAP)
    assert values == pytest.approx([-1.1, -3, -0.777778, -1, 0.6, 0.2, 1.077778], abs=6e-7)


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("probability", [0.05, 0.2, -0.2, 0, -0.2, -0.04, 0.07]),
        ("binary_kl", [0.005025, 0.144097, -0.116322, 0, -0.087177, -0.041291, 0.052986]),
    ],
)
def test_coordinates(on, expected):
    """A bound just inside a token's coordinate closes its gate, one just outside leaves it open."""
    for k, c in enumerate(expected):
        inside, outside = abs(c) - 2e-6, abs(c) + 2e-6
        assert c == 0 or gated(-inside, inside, on=on, **BOTH)[0][k] == 0
        assert gated(-outside, outside, on=on, **BOTH)[0][k] != 0


def test_the_weighted_surrogate_is_a_gate_that_holds_both_sides():
    """``-clip(q) A log p`` with the bounded ratio held constant."""
    x = log_probs("new") - log_probs("old")
    mask, signs = torch.tensor(MASK), laid_out([1.0] * 4, [-1.0] * 3)
    slopes, values = gated(log(0.8), log(1.2), **HELD)
    expected = -x.clamp(log(0.8), log(1.2)).exp() * signs
    assert slopes == pytest.approx(expected[mask].tolist(), rel=3e-16)
    assert values == pytest.approx((expected * log_probs("new"))[mask].tolist(), rel=5e-16)


KL = {
    "k3": (
        [0.272727, -0.2, -0.142857, 0.5, -0.666667, -9, 0.381443],
        [0.045726, 0.017678, 0.009326, 0.193147, 0.155841, 6.697415, 0.098923],
    ),
    "k3_corrected": (
        [0.350299, -0.911608, -0.103858, 0.693147, -0.306495, -0.460517, 0.517728],
        [0.050299, 0.088392, 0.007253, 0.193147, 0.093505, 1.339483, 0.106617],
    ),
    "k1": ([1] * 7, [0.318454, -0.182322, -0.133531, 0.693147, -0.510826, -2.302585, 0.480366]),
    "abs": (
        [1, -1, -1, 1, -1, -1, 1],
        [0.318454, 0.182322, 0.133531, 0.693147, 0.510826, 2.302585, 0.480366],
    ),
}


@pytest.mark.parametrize("kind", KL)
def test_kl(kind):
    correction = {"log_ratio": log_probs("new") - log_probs("old")} if kind == "k3_corrected" else {}
    slopes, values = run(kind, to="reference", advantages=None, clamp=(-20.0, 20.0), **correction)
    assert slopes == pytest.approx(KL[kind][0], abs=6e-7)
    assert values == pytest.approx(KL[kind][1], abs=6e-7)


def test_corrected_kl_without_a_ratio_has_the_slope_of_k2():
    slopes, values = run("k3_corrected", to="reference", advantages=None)
    assert values == pytest.approx(KL["k3"][1], abs=6e-7)
    assert slopes == pytest.approx(KL["k1"][1], abs=6e-7)


def test_limit_holds_the_estimate_and_ends_its_slope():
    slopes, values = run("k3", to="reference", advantages=None, limit=0.16)
    assert slopes == pytest.approx([0.272727, -0.2, -0.142857, 0, -0.666667, 0, 0.381443], abs=6e-7)
    assert values == pytest.approx([0.045726, 0.017678, 0.009326, 0.16, 0.155841, 0.16, 0.098923], abs=6e-7)
    slopes, values = run("k1", to="reference", advantages=None, limit=0.5)
    assert slopes == [1, 1, 1, 0, 0, 0, 1] and values[5] == -0.5


def test_sign_of_zero_is_zero():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    rows = Spans.single(2)
    values, _ = ops.policy_loss(x, rows, "abs", reference=torch.zeros(2, dtype=torch.float64))
    values.sum().backward()
    assert x.grad.tolist() == [0, 0]
