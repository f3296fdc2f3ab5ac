import math

import pytest
import ragged
import reference.policy_loss as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import ops
from tokcredit.blocks import scan
from tokcredit.ops import Rows

pytestmark = pytest.mark.usefixtures("device")

OPERANDS = ("advantages", "weights", "low", "high", "cap")


def shapes():
    return st.fixed_dictionaries({name: st.sampled_from(["batch", "row", "token"]) for name in OPERANDS})


def operands(rows, size, per, dtype=torch.float64):
    made = {}
    for k, name in enumerate(OPERANDS):
        shape = {"batch": (), "row": (len(rows.begin), 1), "token": (size,)}[per[name]]
        x = torch.randn(shape, dtype=torch.float64, generator=ragged.generator(k))
        if name in ("high", "cap", "weights"):
            x = x.abs() + 0.05
        if name == "low":
            x = -x.abs() - 0.05
        made[name] = x.to(dtype)
    return made


def at(x, r, t):
    return x if x.dim() == 0 else x[r, 0] if x.dim() == 2 else x[t]


def definition(
    log_probs, rows, kind, ops_, reference_log_probs=None, log_ratio=None, clamp=(-20.0, 20.0), bound=None, power=0.0
):
    total = log_probs.sum() * 0
    for r, (b, e) in enumerate(zip(rows.begin.tolist(), rows.end.tolist(), strict=True)):
        position, running = 0, 0.0
        for t in range(b, e):
            if rows.mask is None or rows.mask[t]:
                position += 1
                width = position**power
                low = at(ops_["low"], r, t)
                given = None if log_ratio is None else at(log_ratio, r, t)
                if bound is not None:
                    running += (log_probs[t] - reference_log_probs[t]).clamp(-bound, bound).item()
                    given = torch.tensor(running, dtype=torch.float64)
                total = total + at(ops_["weights"], r, t) * reference.token(
                    kind,
                    log_probs[t],
                    at(ops_["advantages"], r, t),
                    (low.abs() if kind == "soft" else low) * width,
                    at(ops_["high"], r, t) * width,
                    at(ops_["cap"], r, t) * width,
                    None if reference_log_probs is None or bound is not None else reference_log_probs[t],
                    given,
                    clamp,
                )
    return total


SOURCES = ("reference", "given", "cumulative", "none")


@given(ragged.rows(), shapes(), st.sampled_from(ops.SURROGATES), st.sampled_from(SOURCES), st.sampled_from([0, 0.5, 1]))
def test_matches_definition(batch, per, kind, source, power):
    rows, size = batch
    args = operands(rows, size, per)
    if kind == "soft":
        args["low"] = args["low"].abs()
    old = ragged.values(size, seed=9) if source in ("reference", "cumulative") else None
    log_ratio = ragged.values(size, seed=8) if source == "given" else None
    bound = 0.7 if source == "cumulative" else None
    ours = ragged.values(size).requires_grad_()
    value, stats = ops.policy_loss(
        ours,
        rows,
        kind,
        reference=old,
        log_ratio=log_ratio,
        cumulative=source == "cumulative",
        bound=bound or math.inf,
        power=power,
        clamp=(-1.5, 1.5),
        **args,
    )
    theirs = ragged.values(size).requires_grad_()
    expected = definition(theirs, rows, kind, args, old, log_ratio, (-1.5, 1.5), bound, power)
    if source == "none" and kind in ("clip", "soft", "k1", "k2", "k3"):
        # With no ratio at all q is the constant 1; the gradient is that of a ratio evaluated on policy.
        theirs = ragged.values(size).requires_grad_()
        expected = definition(theirs, rows, kind, args, theirs.detach(), None, (-1.5, 1.5), None, power)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, torch.zeros_like(ours) if theirs.grad is None else theirs.grad)
    valid = sum(
        int(rows.mask[b:e].sum()) if rows.mask is not None else e - b
        for b, e in zip(rows.begin.tolist(), rows.end.tolist(), strict=True)
    )
    assert stats[:, ops.LOSS_STATS.index("tokens")].sum() == valid


@pytest.mark.parametrize("power", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cumulative_ratio_equals_a_scan_and_a_given_ratio(dtype, power):
    """Rows of several tiles; NaN under the mask. One pass gives what three passes give."""
    edges = torch.tensor([0, 3, 2500, 2500, 9000])
    size = 9000
    generator = ragged.generator(2)
    rows = Rows(edges[:-1], edges[1:], torch.rand(size, generator=generator) > 0.2)
    old = 0.02 * ragged.values(size, torch.float32, seed=3)
    log_probs = (old + 0.02 * ragged.values(size, torch.float32, seed=4)).to(dtype)
    log_probs[~rows.mask] = math.nan
    old, total = old.to(dtype), None
    bounds = {"low": torch.tensor(-0.01), "high": torch.tensor(0.01), "cap": torch.tensor(0.015)}
    advantages = ragged.values(size, torch.float32, seed=5)
    results = []
    for fused in (True, False):
        x = log_probs.clone().requires_grad_()
        if fused:
            window = {**bounds, "reference": old, "cumulative": True, "bound": 0.05, "power": power}
        else:
            total = scan.cumulative((log_probs.float() - old.float()).clamp(-0.05, 0.05), rows)
            width = scan.positions(rows, size).clamp(min=1) ** power
            window = {**{name: b * width for name, b in bounds.items()}, "log_ratio": total}
        value, stats = ops.policy_loss(x, rows, "clip", advantages=advantages, clamp=(-math.inf, 10.0), **window)
        value.backward()
        results.append((value.detach(), stats, x.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    stopped = dict(zip(ops.LOSS_STATS, results[0][1].sum(0).tolist(), strict=True))
    assert min(stopped["below"], stopped["above"], stopped["capped"]) > 0


def test_worked_example():
    log_probs = torch.tensor([-1.0, -1.0], requires_grad=True)
    value, stats = ops.policy_loss(
        log_probs,
        Rows(torch.tensor([0]), torch.tensor([2])),
        "clip",
        reference=torch.tensor([-1.0, -1.5]),
        advantages=torch.tensor(2.0),
        weights=torch.tensor(0.5),
        low=torch.tensor(0.8).log(),
        high=torch.tensor(1.2).log(),
    )
    value.backward()
    assert value.item() == pytest.approx(-2.2)
    assert log_probs.grad.tolist() == [-1.0, 0.0]
    named = dict(zip(ops.LOSS_STATS, stats[0].tolist(), strict=True))
    assert named["above"] == 1 and named["below"] == 0 and named["capped"] == 0
    assert named["ratio"] == pytest.approx(1 + math.exp(0.5))
    assert named["divergence"] == pytest.approx(math.exp(0.5) - 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ops.SURROGATES)
def test_low_precision(dtype, kind):
    size = 2000
    rows = Rows(torch.tensor([0, 900]), torch.tensor([900, size]))
    args = operands(rows, size, dict.fromkeys(OPERANDS, "token"), torch.float32)
    args["low"] = args["low"].abs() if kind == "soft" else args["low"]
    log_probs, old = ragged.values(size, dtype), ragged.values(size, dtype, seed=5)
    value, _ = ops.policy_loss(log_probs, rows, kind, reference=old, **args)
    exact, _ = ops.policy_loss(
        log_probs.double(), rows, kind, reference=old.double(), **{n: x.double() for n, x in args.items()}
    )
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=1e-4)


def test_two_precisions_meet_in_the_wider():
    size = 500
    rows = Rows(torch.tensor([0]), torch.tensor([size]))
    old = ragged.values(size, torch.float32, seed=5)
    log_probs = old.bfloat16().requires_grad_()
    value, _ = ops.policy_loss(log_probs, rows, "clip", reference=old)
    exact, _ = ops.policy_loss(log_probs.detach().double(), rows, "clip", reference=old.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    value.backward()
    assert log_probs.grad.dtype == torch.bfloat16 and (log_probs.grad < 0).all()


def test_extreme_ratios_stay_finite_behind_the_clamp():
    log_probs = torch.tensor([200.0, -200.0], requires_grad=True)
    rows = Rows(torch.tensor([0]), torch.tensor([2]))
    value, _ = ops.policy_loss(
        log_probs,
        rows,
        "clip",
        reference=torch.zeros(2),
        advantages=torch.tensor([-1.0, 1.0]),
        clamp=(-20.0, 20.0),
    )
    value.backward()
    assert value.item() == pytest.approx(math.exp(20) - math.exp(-20))
    assert log_probs.grad.tolist() == [0.0, 0.0]


def test_thread_count_does_not_change_bits(monkeypatch):
    size = 300_000
    edges = torch.arange(0, size + 1, 1000)
    rows = Rows(edges[:-1], edges[1:])
    results = []
    for threads in (1, 6):
        monkeypatch.setattr(ops.call, "_threads", threads)
        log_probs = ragged.values(size, torch.float32).requires_grad_()
        value, stats = ops.policy_loss(log_probs, rows, "clip", reference=ragged.values(size, torch.float32, seed=1))
        value.backward()
        results.append((value.detach(), stats, log_probs.grad))
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_opcheck_and_compile():
    rows = Rows(torch.tensor([0, 2]), torch.tensor([2, 5]), torch.tensor([True, False, True, True, True]))
    args = operands(rows, 5, dict.fromkeys(OPERANDS, "row"))
    log_probs = ragged.values(5)
    torch.library.opcheck(
        torch.ops.tokcredit.policy_loss.default,
        (
            log_probs,
            log_probs + 0.1,
            None,
            *args.values(),
            *rows,
            log_probs > 0,
            0,
            True,
            0.2,
            0.5,
            -20.0,
            20.0,
            True,
            1,
        ),
    )

    def f(x):
        return ops.policy_loss(x, rows, "clip", reference=log_probs.detach() + 0.1, **args)[0]

    x = log_probs.clone().requires_grad_()
    (eager,) = torch.autograd.grad(f(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)
    assert eager.abs().sum() > 0


def test_rejects_wrong_arguments():
    rows = Rows(torch.tensor([0]), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"policy_loss: weights: expected float32 \[3\], got float32 \[7\]"):
        ops.policy_loss(torch.zeros(3), rows, "clip", weights=torch.ones(7))
    with pytest.raises(ValueError, match="policy_loss: cumulative: expected old_log_probs and no log_ratio"):
        ops.policy_loss(torch.zeros(3), rows, "clip", cumulative=True)
    with pytest.raises(ValueError, match=r"policy_loss: old_log_probs: expected float32 \[3\]"):
        ops.policy_loss(torch.zeros(3), rows, "clip", reference=torch.ones(2))


def test_a_token_that_does_not_train_counts_in_sums_and_positions_only():
    rows = Rows(torch.tensor([0]), torch.tensor([4]))
    log_probs = torch.tensor([0.3, 0.2, 0.1, 0.4], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 5.0, 2.0, 0.0], dtype=torch.float64)
    value, stats = ops.policy_loss(
        log_probs,
        rows,
        "clip",
        reference=torch.zeros(4, dtype=torch.float64),
        weights=weights,
        trains=torch.tensor([True, False, True, True]),
        high=torch.tensor(0.35, dtype=torch.float64),
        cumulative=True,
        power=1.0,
    )
    value.backward()
    # Sums 0.3, 0.6 and 1.0 against bounds 0.35, 1.05 and 1.4: none is stopped. A weight of 0 still trains, and counts.
    q = [math.exp(0.3), math.exp(0.6), math.exp(1.0)]
    assert value.item() == pytest.approx(-q[0] - 2 * q[1])
    assert log_probs.grad.tolist() == pytest.approx([-q[0], 0, -2 * q[1], 0])
    named = dict(zip(ops.LOSS_STATS, stats[0].tolist(), strict=True))
    assert (named["tokens"], named["above"]) == (3, 0) and named["ratio"] == pytest.approx(sum(q))


@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_backward_twice_through_one_graph(scale):
    """The gradient is scaled where it lies and given away; a second pass makes it anew."""
    rows = Rows(torch.tensor([0]), torch.tensor([5]), torch.tensor([True, False, True, True, True]))
    old = ragged.values(5, seed=1)
    x = ragged.values(5).requires_grad_()
    loss = ops.policy_loss(x, rows, "k2", reference=old, advantages=torch.tensor(2.0, dtype=torch.float64))[0]
    expected = scale * 2 * (x.detach() - old) * rows.mask
    for _ in range(2):
        (gradient,) = torch.autograd.grad(scale * loss, x, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_sums_and_positions_go_on_over_blocks(masked):
    """A row much longer than what is held at once, with a window that widens along it."""
    size = 3_001
    mask = ragged.values(size, seed=2) > -1 if masked else None
    rows = Rows(torch.tensor([0]), torch.tensor([size]), mask)
    old = ragged.values(size)
    x = (old + 0.01 * ragged.values(size, seed=1)).requires_grad_()
    bounds = {name: torch.tensor(b, dtype=torch.float64) for name, b in (("low", -0.001), ("high", 0.002))}
    loss, _ = ops.policy_loss(x, rows, "clip", reference=old, cumulative=True, power=0.5, **bounds)
    (gradient,) = torch.autograd.grad(loss, x)
    live = torch.ones(size, dtype=torch.bool) if mask is None else mask
    q = (torch.where(live, x.detach() - old, 0)).cumsum(0)
    width = live.cumsum(0).double().sqrt()
    # Advantage 1: stopped above only.
    expected = torch.where(live & (q <= 0.002 * width), -q.exp(), 0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert (expected == 0).any() and (expected != 0).any()
