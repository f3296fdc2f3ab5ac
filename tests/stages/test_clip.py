import math

import naive
import pytest
import ragged
import tokcredit as tc
import torch


def objective_with(clip, **changes):
    return tc.Objective(clip=clip, aggregation=tc.aggregation.token_sum(), **changes)


def check(clip, of_token, batch=None, current=None, **changes):
    """The clip stage against the loss of one token: ``of_token(A, log_prob, old, position)``."""
    if batch is None:
        batch, current = naive.random_batch()

    def formula(batch, log_probs):
        total = 0.0
        for a, tokens in zip(naive.group_advantages(batch), naive.rows_of(batch), strict=True):
            for position, t in enumerate(tokens, start=1):
                total = total + of_token(a, log_probs[t], batch.old_log_probs[t], position)
        return total

    return naive.check(objective_with(clip, **changes), batch, current, formula)


@pytest.mark.parametrize(
    ("low", "high", "cap"), [(0.2, 0.28, None), (0.1, 0.05, 1.2), (0.0, 0.3, 3.0), (1.5, 0.2, None)]
)
def test_ppo(low, high, cap):
    check(
        tc.clip.ppo(low, high, cap),
        lambda a, x, old, _: naive.clipped(a, (x - old).exp(), max(1 - low, 0), 1 + high, cap),
    )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cap", [None, 0.3])
def test_growing(power, cap):
    def of_token(a, x, old, position):
        s = position**power
        largest = None if cap is None else math.exp(cap * s)
        return naive.clipped(a, (x - old).exp(), math.exp(-0.05 * s), math.exp(0.1 * s), largest)

    check(tc.clip.growing(0.05, 0.1, power, cap), of_token)


def test_soft():
    def of_token(a, x, old, _):
        tau = 0.7 if a > 0 else 1.3
        return -4 / tau * torch.sigmoid(tau * ((x - old).exp() - 1)) * a

    check(tc.clip.soft(0.7, 1.3), of_token)


def test_unclipped():
    check(tc.clip.unclipped(), lambda a, x, old, _: -a * (x - old).exp())


def coordinate(on, x, old):
    if on in ("ratio", "difference"):
        return x - old
    p, q = math.exp(old), math.exp(x)
    if on == "probability":
        return q - p
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return math.copysign(kl, x - old)


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize(("outside_low", "outside_high"), [(0.0, 0.0), (0.4, 0.7)])
@pytest.mark.parametrize(
    ("on", "low", "high"),
    [("ratio", -0.2, 0.25), ("difference", -0.2, 0.25), ("probability", -0.1, 0.12), ("binary_kl", -0.02, 0.03)],
)
def test_gated(on, low, high, outside_low, outside_high, both_sides):
    """Slopes ``-A gate weight``; the value is the slope times the log-prob, so torch differentiates it."""
    g = ragged.generator(4)
    batch, _ = naive.random_batch()
    old = -0.05 - 1.5 * torch.rand(84, generator=g, dtype=torch.float64)
    current = (old + 0.4 * torch.randn(84, generator=g, dtype=torch.float64)).clamp(max=-0.01).view(12, 7)
    batch = batch.with_inputs(old_log_probs=old)
    seen = set()

    def of_token(a, x, old, _):
        new, o = x.item(), old.item()
        c = coordinate(on, new, o)
        below = c < low and (a < 0 or both_sides)
        above = c > high and (a > 0 or both_sides)
        weight = math.exp(min(new - o, 0.3))
        if on == "ratio" and below:
            weight = math.exp(low)
        if on == "ratio" and above:
            weight = math.exp(high)
        gate = outside_low if below else outside_high if above else 1.0
        seen.add((below, above))
        return -a * gate * weight * x

    check(tc.clip.gated(on, low, high, outside_low, outside_high, 0.3, both_sides), of_token, batch, current)
    assert seen == {(False, False), (True, False), (False, True)}


def test_a_window_of_some_rows():
    batch, _ = naive.random_batch()
    window = tc.clip.growing(0.1, 0.2, 1.0, 0.3)(batch, batch.rewards[:, None])
    chosen = batch.selection([2, 0])
    assert window.take(chosen) is window
    wide = window.per_token(batch.spans)
    assert wide.power == 0 and torch.equal(wide.take(chosen).high, chosen.of_tokens(wide.high))
    assert wide.high[batch.response_mask].unique().numel() > 2


def test_which_stages_have_bounds():
    stages = (tc.clip.ppo(), tc.clip.growing(0.1, 0.1), tc.clip.gated(), tc.clip.soft(), tc.clip.unclipped())
    assert [x.has_bounds for x in stages] == [True, True, True, False, False]


@pytest.mark.parametrize("clip", [tc.clip.ppo, tc.clip.growing])
def test_bounds_may_follow_a_schedule(clip):
    batch, current = naive.random_batch()
    scheduled = objective_with(clip(tc.schedule.linear(0.05, 0.25), tc.schedule.linear(0.4, 0.0)))
    plain = objective_with(clip(0.1, 0.3))
    ours = scheduled.loss(scheduled.prepare(batch, progress=0.25), current).loss
    torch.testing.assert_close(ours, plain.loss(plain.prepare(batch), current).loss)
    assert ours != scheduled.loss(scheduled.prepare(batch, progress=1.0), current).loss
