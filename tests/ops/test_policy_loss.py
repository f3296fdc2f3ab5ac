import math

import pytest
import ragged
import reference.policy_loss as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import Spans, ops
from tokcredit.blocks import scan

pytestmark = pytest.mark.usefixtures("device")

OPERANDS = ("advantages", "weights", "low", "high", "cap", "outside_low", "outside_high", "given")


def operands(rows, size, per, dtype=torch.float64):
    """Random operands, each one number, one per row or one per token; bounds on either side of 0."""
    made = {}
    for k, name in enumerate(OPERANDS):
        shape = {"number": (), "row": (len(rows.begin), 1), "token": (size,)}[per[name]]
        x = torch.randn(shape, dtype=torch.float64, generator=ragged.generator(k))
        if name in ("high", "cap", "weights", "given"):
            x = x.abs() + 0.05
        if name == "low":
            x = -x.abs() - 0.05
        if name == "outside_high":
            x = x * (x > 0)  # some exactly 0
        made[name] = x.to(dtype) if x.dim() else x.item()
    return made


def at(x, r, t):
    if not isinstance(x, torch.Tensor):
        return torch.tensor(x, dtype=torch.float64)
    return x[r, 0] if x.dim() == 2 else x[t]


def definition(log_probs, rows, kind, args, old=None, log_ratio=None, bound=None, power=0.0, **settings):
    """Values of rows and slopes of tokens, token by token."""
    values, slopes = torch.zeros(len(rows.begin), dtype=torch.float64), torch.zeros_like(log_probs)
    for r, (b, e) in enumerate(zip(rows.begin.tolist(), rows.end.tolist(), strict=True)):
        position, running = 0, torch.zeros((), dtype=torch.float64)
        for t in range(b, e):
            if rows.mask is not None and not rows.mask[t]:
                continue
            position += 1
            width = position**power
            given = None if log_ratio is None else at(log_ratio, r, t)
            if bound is not None:
                running = running + (log_probs[t] - old[t]).clamp(-bound, bound)
                given = running
            low, high, cap = (at(args[name], r, t) * width for name in ("low", "high", "cap"))
            gate = {n: at(args[n], r, t) for n in ("outside_low", "outside_high", "given")}
            gate |= {n: settings[n] for n in ("on", "value", "both_sides")}
            value, slope = reference.token(
                kind,
                log_probs[t],
                at(args["advantages"], r, t),
                low,
                high,
                cap,
                None if old is None else old[t],
                given,
                settings["clamp"],
                settings["limit"],
                **(gate if kind == "gated" else {}),
            )
            weight = at(args["weights"], r, t)
            values[r] += weight * value
            slopes[t] = weight * slope
    return values, slopes


SOURCES = ("reference", "given", "both", "cumulative", "none")


@given(
    ragged.spans(),
    st.fixed_dictionaries({name: st.sampled_from(["number", "row", "token"]) for name in OPERANDS}),
    st.sampled_from([*ops.SURROGATES, *("gated",) * 5]),
    st.sampled_from(SOURCES),
    st.sampled_from([0, 0.5, 1]),
    st.fixed_dictionaries(
        {
            "on": st.sampled_from(ops.COORDINATES),
            "value": st.sampled_from(ops.GATED_VALUES),
            "both_sides": st.booleans(),
            "limit": st.sampled_from([math.inf, 0.3]),
        }
    ),
)
def test_matches_definition(batch, per, kind, source, power, settings):
    rows, size = batch, batch.size
    args = operands(rows, size, per)
    if kind == "soft":
        args["low"] = abs(args["low"])
    if source in ("given", "none") and settings["on"] not in ("ratio", "difference"):
        settings = settings | {"on": "difference"}  # the others need a reference
    settings = settings | {"clamp": (-1.5, 1.5)}
    old = None if source in ("given", "none") else -ragged.values(size, seed=9).abs()
    log_ratio = ragged.values(size, seed=8) if source in ("given", "both") else None
    bound = 0.7 if source == "cumulative" else None
    log_probs = (-ragged.values(size).abs()).requires_grad_()
    values, stats = ops.policy_loss(
        log_probs,
        rows,
        kind,
        reference=old,
        log_ratio=log_ratio,
        cumulative=source == "cumulative",
        bound=bound or math.inf,
        power=power,
        **settings,
        **args,
    )
    expected, slopes = definition(log_probs.detach(), rows, kind, args, old, log_ratio, bound, power, **settings)
    torch.testing.assert_close(values, expected)
    factor = ragged.values(len(rows.begin), seed=7)
    factor[0] = 1.0
    (gradient,) = torch.autograd.grad(values, log_probs, factor)
    scale = torch.ones_like(slopes)
    for r, (b, e) in enumerate(zip(rows.begin.tolist(), rows.end.tolist(), strict=True)):
        scale[b:e] = factor[r]
    torch.testing.assert_close(gradient, slopes * scale)
    live = [
        int(rows.mask[b:e].sum()) if rows.mask is not None else e - b
        for b, e in zip(rows.begin.tolist(), rows.end.tolist(), strict=True)
    ]
    assert stats[:, ops.LOSS_STATS.index("tokens")].tolist() == live
    torch.testing.assert_close(stats[:, ops.LOSS_STATS.index("loss")], expected)


@pytest.mark.parametrize("power", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cumulative_ratio_equals_a_scan_and_a_given_ratio(dtype, power):
    """Rows of several tiles; NaN under the mask. One pass gives what three passes give."""
    edges = torch.tensor([0, 3, 2500, 2500, 9000])
    size = 9000
    generator = ragged.generator(2)
    rows = Spans.from_cu_seqlens(edges, torch.rand(size, generator=generator) > 0.2)
    old = 0.02 * ragged.values(size, torch.float32, seed=3)
    log_probs = (old + 0.02 * ragged.values(size, torch.float32, seed=4)).to(dtype)
    log_probs[~rows.mask] = math.nan
    old, total = old.to(dtype), None
    bounds = {"low": -0.01, "high": 0.01, "cap": 0.015}
    advantages = ragged.values(size, torch.float32, seed=5)
    results = []
    for fused in (True, False):
        x = log_probs.clone().requires_grad_()
        if fused:
            window = {**bounds, "reference": old, "cumulative": True, "bound": 0.05, "power": power}
        else:
            total = scan.cumulative((log_probs.float() - old.float()).clamp(-0.05, 0.05), rows)
            width = scan.positions(rows).clamp(min=1) ** power
            window = {**{name: b * width for name, b in bounds.items()}, "log_ratio": total}
        value, stats = ops.policy_loss(x, rows, "clip", advantages=advantages, clamp=(-math.inf, 10.0), **window)
        value.sum().backward()
        results.append((value.detach(), stats, x.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    stopped = dict(zip(ops.LOSS_STATS, results[0][1].sum(0).tolist(), strict=True))
    assert min(stopped["below"], stopped["above"], stopped["capped"]) > 0


def test_worked_example():
    log_probs = torch.tensor([-1.0, -1.0], requires_grad=True)
    value, stats = ops.policy_loss(
        log_probs,
        Spans.single(2),
        "clip",
        reference=torch.tensor([-1.0, -1.5]),
        advantages=2,
        weights=0.5,
        low=math.log(0.8),
        high=math.log(1.2),
    )
    value.sum().backward()
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
    rows = Spans.from_cu_seqlens(torch.tensor([0, 900, size]))
    args = operands(rows, size, dict.fromkeys(OPERANDS, "token"), torch.float32)
    args["low"] = args["low"].abs() if kind == "soft" else args["low"]
    log_probs, old = -ragged.values(size, dtype).abs(), -ragged.values(size, dtype, seed=5).abs()
    value, _ = ops.policy_loss(log_probs, rows, kind, reference=old, **args)
    exact, _ = ops.policy_loss(
        log_probs.double(), rows, kind, reference=old.double(), **{n: x.double() for n, x in args.items()}
    )
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=1e-4)


def test_two_precisions_meet_in_the_wider():
    size = 500
    rows = Spans.single(size)
    old = ragged.values(size, torch.float32, seed=5)
    log_probs = old.bfloat16().requires_grad_()
    value, _ = ops.policy_loss(log_probs, rows, "clip", reference=old)
    exact, _ = ops.policy_loss(log_probs.detach().double(), rows, "clip", reference=old.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    value.sum().backward()
    assert log_probs.grad.dtype == torch.bfloat16 and (log_probs.grad < 0).all()


def test_extreme_ratios_stay_finite_behind_the_clamp():
    log_probs = torch.tensor([200.0, -200.0], requires_grad=True)
    rows = Spans.single(2)
    value, _ = ops.policy_loss(
        log_probs,
        rows,
        "clip",
        reference=torch.zeros(2),
        advantages=torch.tensor([-1.0, 1.0]),
        clamp=(-20.0, 20.0),
    )
    value.sum().backward()
    assert value.item() == pytest.approx(math.exp(20) - math.exp(-20))
    assert log_probs.grad.tolist() == [0.0, 0.0]


def test_thread_count_does_not_change_bits(monkeypatch):
    size = 300_000
    edges = torch.arange(0, size + 1, 1000)
    rows = Spans.from_cu_seqlens(edges)
    results = []
    for threads in (1, 6):
        monkeypatch.setattr(ops.call, "_threads", threads)
        log_probs = ragged.values(size, torch.float32).requires_grad_()
        value, stats = ops.policy_loss(log_probs, rows, "clip", reference=ragged.values(size, torch.float32, seed=1))
        value.sum().backward()
        results.append((value.detach(), stats, log_probs.grad))
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_opcheck_and_compile():
    rows = Spans.from_cu_seqlens(torch.tensor([0, 2, 5]), torch.tensor([True, False, True, True, True]))
    args = operands(rows, 5, dict.fromkeys(OPERANDS, "row"))
    log_probs = -ragged.values(5).abs()
    tensors = [None, *args.values()]
    numbers = [0.0, 1.0, 1.0, -math.inf, math.inf, math.inf, 0.0, 0.0, 0.0]
    for kind in ("clip", "gated"):
        settings = (ops.SURROGATES.index(kind), 2, 0, 0, False, 0.2, 0.5, math.inf, -20.0, 20.0, True, 1)
        torch.library.opcheck(
            torch.ops.tokcredit.policy_loss.default,
            (log_probs, log_probs + 0.1, tensors, numbers, *rows.arrays, log_probs > 0, *settings),
        )
    torch.library.opcheck(
        torch.ops.tokcredit.scale_rows_.default, (ragged.values(5), ragged.values(2), rows.begin, rows.end, 1)
    )

    def f(x):
        values = ops.policy_loss(x, rows, "clip", reference=log_probs.detach() + 0.1, **args)[0]
        return (values * torch.arange(2)).sum()

    x = log_probs.clone().requires_grad_()
    (eager,) = torch.autograd.grad(f(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)
    assert eager.abs().sum() > 0


def test_rejects_wrong_arguments():
    rows, x = Spans.single(3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"policy_loss: weights: expected float32 \[3\], got float32 \[7\]"):
        ops.policy_loss(x, rows, "clip", weights=torch.ones(7))
    with pytest.raises(ValueError, match="policy_loss: reference: expected a tensor, because the log-ratio is cumul"):
        ops.policy_loss(x, rows, "clip", cumulative=True)
    with pytest.raises(ValueError, match="policy_loss: log_ratio: expected None because the log-ratio is cumulative"):
        ops.policy_loss(x, rows, "clip", cumulative=True, reference=x, log_ratio=x)
    with pytest.raises(ValueError, match="policy_loss: reference: expected a tensor, because the gate compares"):
        ops.policy_loss(x, rows, "gated", on="probability")
    with pytest.raises(ValueError, match=r"policy_loss: reference: expected float32 \[3\]"):
        ops.policy_loss(x, rows, "clip", reference=torch.ones(2))
    for name, word in (("surrogate", "clip, soft"), ("on", "ratio, difference"), ("value", "score, ratio, whole")):
        settings = {"surrogate": "gated", name: "nonsense"}
        with pytest.raises(ValueError, match=f"policy_loss: {name}: expected one of {word}.*, got 'nonsense'"):
            ops.policy_loss(x, rows, settings.pop("surrogate"), **settings)


def test_a_token_that_does_not_train_counts_in_sums_and_positions_only():
    rows = Spans.single(4)
    log_probs = torch.tensor([0.3, 0.2, 0.1, 0.4], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 5.0, 2.0, 0.0], dtype=torch.float64)
    value, stats = ops.policy_loss(
        log_probs,
        rows,
        "clip",
        reference=torch.zeros(4, dtype=torch.float64),
        weights=weights,
        trains=torch.tensor([True, False, True, True]),
        high=0.35,
        cumulative=True,
        power=1.0,
    )
    value.sum().backward()
    # Sums 0.3, 0.6 and 1.0 against bounds 0.35, 1.05 and 1.4: none is stopped. A weight of 0 still trains, and counts.
    q = [math.exp(0.3), math.exp(0.6), math.exp(1.0)]
    assert value.item() == pytest.approx(-q[0] - 2 * q[1])
    assert log_probs.grad.tolist() == pytest.approx([-q[0], 0, -2 * q[1], 0])
    named = dict(zip(ops.LOSS_STATS, stats[0].tolist(), strict=True))
    assert (named["tokens"], named["above"]) == (3, 0) and named["ratio"] == pytest.approx(sum(q))


@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_backward_twice_through_one_graph(scale):
    """The slopes are scaled where they lie and given away; a second pass makes them anew."""
    rows = Spans.from_cu_seqlens(torch.tensor([0, 3, 5]), torch.tensor([True, False, True, True, True]))
    old = ragged.values(5, seed=1)
    x = ragged.values(5).requires_grad_()
    values = ops.policy_loss(x, rows, "k2", reference=old, advantages=2)[0]
    loss = values[0] + scale * values[1]
    expected = 2 * (x.detach() - old) * rows.mask * torch.tensor([1.0, 1.0, 1.0, scale, scale])
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_losses_of_pairs_and_lists_differentiate_through_the_rows():
    """A link on row values: each row's slopes are scaled by what the link makes of it."""
    edges = torch.tensor([0, 2, 5, 6, 9])
    rows = Spans.from_cu_seqlens(edges)
    old, x = ragged.values(9, seed=1), ragged.values(9).requires_grad_()
    y = x.detach().clone().requires_grad_()
    values = ops.policy_loss(x, rows, "k1", reference=old)[0]
    plain = torch.stack([(y - old)[b:e].sum() for b, e in zip(rows.begin, rows.end, strict=True)])
    for v in (values, plain):
        (-torch.nn.functional.logsigmoid(v[0] - v[1]) + v[2:].logsumexp(0)).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_scaling_rows_keeps_zeros_and_rows_of_factor_one():
    x = torch.tensor([1.0, 0.0, 7.0, 2.0, 0.0, math.nan, 5.0, 3.0])
    begin, end = torch.tensor([0, 3, 5, 7]), torch.tensor([2, 5, 7, 8])
    torch.ops.tokcredit.scale_rows_(x, torch.tensor([math.nan, math.inf, 1.0, 0.5]), begin, end, 1)
    # Padding (7) and masked tokens (0) stay, whatever the factor.
    assert str(x.tolist()) == "[nan, 0.0, 7.0, inf, 0.0, nan, 5.0, 1.5]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_of_rows_and_tokens(dtype):
    x = torch.tensor([1.0, 0.0, 7.0, 2.0, -3.0], dtype=dtype)
    factor = torch.tensor([[math.inf], [0.5]], dtype=dtype)
    spans = Spans(torch.tensor([0, 3]), torch.tensor([2, 5]), 5)
    y = ops.row_product(x, factor, spans)
    assert str(y.tolist()) == "[inf, nan, 0.0, 1.0, -1.5]" and y.dtype == dtype
    assert x.tolist() == [1.0, 0.0, 7.0, 2.0, -3.0]
    assert ops.row_product(x, factor.double(), spans).dtype == torch.float64
    torch.library.opcheck(torch.ops.tokcredit.row_product.default, (x, x[1:3], spans.begin, spans.end, 1))
    empty = Spans(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 3)
    assert ops.row_product(x[:3], factor[:0], empty).tolist() == [0.0] * 3


@pytest.mark.parametrize("masked", [False, True])
def test_sums_and_positions_go_on_over_blocks(masked):
    """A row much longer than what is held at once, with a window that widens along it."""
    size = 3_001
    mask = ragged.values(size, seed=2) > -1 if masked else None
    rows = Spans.single(size, mask=mask)
    old = ragged.values(size)
    x = (old + 0.01 * ragged.values(size, seed=1)).requires_grad_()
    values, _ = ops.policy_loss(x, rows, "clip", reference=old, cumulative=True, power=0.5, low=-0.001, high=0.002)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    live = torch.ones(size, dtype=torch.bool) if mask is None else mask
    q = (torch.where(live, x.detach() - old, 0)).cumsum(0)
    width = live.cumsum(0).double().sqrt()
    # Advantage 1: stopped above only.
    expected = torch.where(live & (q <= 0.002 * width), -q.exp(), 0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert (expected == 0).any() and (expected != 0).any()
