"""Numbers that are not finite: they reach loss and gradient where a token trains, and stay under a False mask."""

import itertools
import math

import pytest
import torch
from tokcredit import Spans, ops

pytestmark = pytest.mark.usefixtures("device")

SIZE, AT = 37, 20  # a token of the second row, neither its first nor its last
EDGES = [0, 9, 37]
SOURCES = ("reference", "given", "cumulative")


def settings_of(kind):
    """The ways in which a surrogate can be asked for."""
    if kind != "gated":
        return [{}]
    both = (False, True)
    return [
        {"on": on, "value": value, "both_sides": sides}
        for on, value, sides in itertools.product(ops.COORDINATES, ops.GATED_VALUES, both)
    ]


def numbers(seed, dtype=torch.float32):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.rand(SIZE, generator=generator, dtype=torch.float64).to(dtype)


def arguments(dtype):
    return {
        "log_probs": -numbers(0, dtype),
        "reference": -numbers(1, dtype),
        "advantages": numbers(2, dtype) - 0.5,
        "weights": numbers(3, dtype) + 0.5,
    }


def run(kind, args, mask=None, trains=None, **settings):
    args = dict(args)
    x = args.pop("log_probs").clone().requires_grad_()
    edges = torch.tensor(EDGES)
    bounds = {"low": 0.8, "high": 1.1} if kind == "soft" else {"low": -0.05, "high": 0.05, "cap": 0.2}
    settings = {"clamp": (-0.4, 0.4), **bounds, **settings}
    values, stats = ops.policy_loss(x, Spans.from_cu_seqlens(edges, mask), kind, trains=trains, **args, **settings)
    values.sum().backward()
    return values.detach(), stats, x.grad


def check_nan(kind, where, source, dtype, settings):
    args = arguments(dtype)
    settings = {"cumulative": source == "cumulative", **settings}
    if source == "given":
        settings["log_ratio"] = numbers(4, dtype) - 0.5
    clean = run(kind, args, **settings)
    assert all(torch.isfinite(x).all() for x in clean)
    args[where][AT] = math.nan
    values, stats, gradient = run(kind, args, **settings)
    assert values[0] == clean[0][0] and values[1].isnan()
    carried = source == "cumulative" and where in ("log_probs", "reference")
    # The estimators look at each token's own difference; the ratio of the tokens before weighs only the last.
    carried &= kind in ("clip", "soft", "gated", "k3_corrected")
    expected = torch.zeros(SIZE, dtype=torch.bool)
    expected[AT : SIZE if carried else AT + 1] = True
    assert torch.equal(gradient.isnan(), expected)
    assert torch.equal(gradient[~expected], clean[2][~expected])
    assert stats[:, ops.LOSS_STATS.index("nonfinite")].tolist() == [0, where == "log_probs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ops.SURROGATES)
def test_nan_reaches_the_row_and_the_token(kind, dtype):
    places = ("log_probs", "reference", "advantages", "weights")
    for where, source, settings in itertools.product(places, SOURCES, settings_of(kind)):
        check_nan(kind, where, source, dtype, settings)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ops.SURROGATES)
def test_nothing_leaks_from_under_the_mask(kind, junk):
    mask = torch.ones(SIZE, dtype=torch.bool)
    mask[AT] = mask[0] = False
    clean = arguments(torch.float32)
    dirty = {name: torch.where(mask, x, junk) for name, x in clean.items()}
    ratio = numbers(4) - 0.5
    for source, settings in itertools.product(SOURCES, settings_of(kind)):
        cumulative = {"cumulative": source == "cumulative", **settings}
        given = [{}, {}] if source != "given" else [{"log_ratio": r} for r in (ratio, torch.where(mask, ratio, junk))]
        expected = run(kind, clean, mask, **cumulative, **given[0])
        for one, other in zip(run(kind, dirty, mask, **cumulative, **given[1]), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ops.SURROGATES)
def test_nothing_leaks_from_a_token_that_does_not_train(kind):
    trains = torch.ones(SIZE, dtype=torch.bool)
    trains[AT] = False
    clean = arguments(torch.float32)
    dirty = {name: torch.where(trains, x, math.nan) for name, x in clean.items()}
    for settings in settings_of(kind):
        expected = run(kind, clean, trains=trains, **settings)
        for one, other in zip(run(kind, dirty, trains=trains, **settings), expected, strict=True):
            assert torch.equal(one, other)


def test_infinite_log_probs():
    """They go through the formula, and are counted."""
    edges = torch.tensor([0, 1, 2, 3])
    rows = Spans.from_cu_seqlens(edges)
    x = torch.tensor([-math.inf, math.inf, -1.0], dtype=torch.float64, requires_grad=True)
    values, stats = ops.policy_loss(x, rows, "clip", reference=torch.zeros(3, dtype=torch.float64))
    values.sum().backward()
    assert values.tolist() == pytest.approx([0, -math.inf, -math.exp(-1)])
    assert x.grad.tolist() == pytest.approx([0, -math.inf, -math.exp(-1)])
    assert stats[:, ops.LOSS_STATS.index("nonfinite")].tolist() == [1, 1, 0]
    # Behind a clamp the ratio is finite and constant.
    x.grad = None
    values, _ = ops.policy_loss(x, rows, "clip", reference=torch.zeros(3, dtype=torch.float64), clamp=(-2, 2))
    values.sum().backward()
    assert values.tolist() == pytest.approx([-math.exp(-2), -math.exp(2), -math.exp(-1)])
    assert x.grad.tolist() == pytest.approx([0, 0, -math.exp(-1)])
    # A gate that is closed keeps an infinite log-prob out; an open one reports what it is.
    x.grad = None
    settings = {"reference": torch.zeros(3, dtype=torch.float64), "advantages": -1.0, "clamp": (-2, 2)}
    values, _ = ops.policy_loss(x, rows, "gated", low=-1.5, high=math.inf, **settings)
    values.sum().backward()
    assert values.tolist() == pytest.approx([0, math.inf, -math.exp(-1)])
    assert x.grad.tolist() == pytest.approx([0, math.exp(2), math.exp(-1)])


@pytest.mark.parametrize("kind", ["clip", "soft", "k1"])
@pytest.mark.parametrize("source", ["reference", "none", "cumulative"])
def test_an_infinite_advantage_is_an_infinite_loss(kind, source):
    """Also on rows so long that CUDA takes their tokens four at a time."""
    size = 1200
    x = torch.zeros(2 * size, requires_grad=True)
    rows = Spans.from_cu_seqlens(torch.tensor([0, size, 2 * size]))
    settings = {"low": 1.0, "high": 1.0} if kind == "soft" else {"low": -0.2, "high": 0.2}
    settings["advantages"] = torch.tensor([[math.inf], [1.0]])
    reference = None if source == "none" else torch.full((2 * size,), -1e-5)
    values, _ = ops.policy_loss(x, rows, kind, reference=reference, cumulative=source == "cumulative", **settings)
    values.sum().backward()
    none = kind == "k1" and source == "none"  # infinity times a divergence of 0
    assert values.isinf().tolist() == [not none, False] and values.isnan().tolist() == [none, False]
    assert not x.grad[size:].isnan().any()


def test_equal_infinities_are_not_a_number():
    x = torch.tensor([-math.inf, -1.0], requires_grad=True)
    values, _ = ops.policy_loss(x, Spans.single(2), "clip", reference=x.detach().clone())
    values.sum().backward()
    assert values.isnan().all() and x.grad.isnan().tolist() == [True, False]
