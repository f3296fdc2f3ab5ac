"""One predicate as a filter, a token weight and an advantage scale, against loops over tokens."""

import itertools
import math

import naive
import pytest
import ragged
import tokcredit as tc
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import ops
from tokcredit.stages import within
from tokcredit.stages.clip import Window

CASES = [
    *itertools.product(within.STATISTICS, within.OVER, ["any"]),
    ("ratio", "token", "positive"),
    ("ratio", "token", "negative"),
    ("k3", "mean", "positive"),
    ("difference", "sum", "negative"),
]
BOUNDS = {"ratio": (0.9, 1.2), "difference": (-0.1, 0.2), "k1": (-0.1, 0.2), "k2": (0.005, 0.05), "k3": (0.005, 0.05)}
ROW_SUM = {"ratio": (0.6, 1.7), "difference": (-0.2, 0.3), "k1": (-0.4, 0.5), "k2": (0.1, 0.3), "k3": (0.1, 0.3)}
EXTREME = {"max": {"k2": (0.0, 0.1), "k3": (0.0, 0.1)}, "min": {"k2": (0.001, 1.0), "k3": (0.001, 1.0)}}


def bounds(statistic, over):
    if over == "sum":
        return ROW_SUM[statistic]
    wide = {"max": (0.0, 0.4), "min": (-0.5, 0.0)}
    if over in wide and statistic in ("difference", "k1"):
        return wide[over]
    if over in wide and statistic == "ratio":
        return tuple(math.exp(x) for x in wide[over])
    return EXTREME.get(over, {}).get(statistic, BOUNDS[statistic])


def statistic_of(name, x):
    return {"ratio": x, "difference": x, "k1": -x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x}[name]


def turns_of(tokens):
    """Maximal runs of consecutive positions."""
    turns = []
    for t in tokens:
        if not turns or turns[-1][-1] != t - 1:
            turns.append([])
        turns[-1].append(t)
    return turns


def expected_of(batch, difference, statistic, over, low, high, signs, advantages):
    """The predicate at each token that the policy chose."""
    out = {}
    for r, tokens in enumerate(naive.rows_of(batch)):
        own = [statistic_of(statistic, difference[t].item()) for t in tokens]
        reduced = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "min": min}
        turn = {t: reduced["mean"]([own[tokens.index(s)] for s in run]) for run in turns_of(tokens) for t in run}
        for t, value in zip(tokens, own, strict=True):
            value = {"token": value, "turn": turn[t]}[over] if over in ("token", "turn") else reduced[over](own)
            value = math.exp(value) if statistic == "ratio" else value
            free = {"any": False, "positive": advantages[r] <= 0, "negative": advantages[r] >= 0}[signs]
            out[t] = free or low <= value <= high
    return out


def batch_and_policies(seed=1):
    g = ragged.generator(seed)
    batch, _ = naive.random_batch(seed)
    engine = batch.old_log_probs + 0.25 * torch.randn(84, generator=g, dtype=torch.float64)
    current = batch.old_log_probs + 0.25 * torch.randn(84, generator=g, dtype=torch.float64)
    return batch.with_inputs(rollout_log_probs=engine), current


@pytest.mark.parametrize(("statistic", "over", "signs"), CASES)
def test_filter_weight_and_scale_against_loops(statistic, over, signs):
    batch, current = batch_and_policies()
    low, high = bounds(statistic, over)
    advantages = torch.tensor(naive.group_advantages(batch))[:, None]
    tokens = batch.response_mask.nonzero()[:, 0].tolist()

    def compare(ours, difference):
        ours = ours if ours.dim() == 1 else ours.expand(12, 7).reshape(-1)
        expected = expected_of(batch, difference, statistic, over, low, high, signs, advantages[:, 0].tolist())
        assert [bool(ours[t]) for t in tokens] == [expected[t] for t in tokens]
        assert set(expected.values()) == {True, False}, "bounds that never bind prove nothing"

    recorded = batch.old_log_probs - batch.rollout_log_probs
    settings = (statistic, over, low, high, signs)
    chosen = tc.filters.within(*settings)(batch, advantages)
    weight = tc.token_weights.within(*settings)(batch, advantages)
    assert chosen.dtype == torch.bool and weight.dtype == torch.float64
    assert torch.equal(weight, chosen.double())
    compare(chosen, recorded)
    scale = tc.scale.within(*settings)
    factor = scale(current, current, advantages, batch.spans, Window("clip"), scale.signal(batch, Window("clip")))
    assert set(factor.unique().tolist()) <= {0.0, 1.0}
    compare(factor, current - batch.old_log_probs)


@given(spans=ragged.spans(), seed=st.integers(0, 99))
def test_mean_of_a_turn(spans, seed):
    """Rows that touch have different turns, padding and empty rows belong to none, and a NaN stays in its turn."""
    x = ragged.values(spans.size, seed=seed)
    turns = tc.segment.runs(spans)
    inside = ops.spread(torch.ones(spans.num_rows, dtype=torch.bool), spans)
    expected = ops.spread(tc.segment.mean(x, turns.spans), turns.spans)
    torch.testing.assert_close(within.turn_mean(x, spans)[inside], expected[inside])
    if len(turns.at):
        x[turns.at[-1]] = math.nan
        own = torch.arange(spans.size) >= turns.at[-1]
        own &= torch.arange(spans.size) < turns.spans.end[-1]
        assert torch.equal(within.turn_mean(x, spans).isnan()[inside], own[inside])


def test_bounds_are_inclusive_and_nan_lies_outside():
    batch = tc.Rollouts(
        torch.arange(4),
        torch.tensor([0, 4]),
        torch.tensor([0]),
        torch.tensor([1.0]),
        old_log_probs=torch.tensor([0.5, 0.25, math.nan, -7.0]),
        rollout_log_probs=torch.tensor([0.0, 0.0, 0.0, math.nan]),
    )
    one = torch.ones(1, 1)
    # The engine did not report the last token: its log-ratio counts as 0, as in TRL's off-policy mask.
    assert tc.filters.within("difference", "token", 0.25, 0.5)(batch, one).tolist() == [True, True, False, False]
    assert tc.filters.within("difference", "token", -1, 1)(batch, one).tolist() == [True, True, False, True]
    assert not tc.filters.within("difference", "sum", -9, 9)(batch, one).any()
    known = batch.with_inputs(old_log_probs=torch.tensor([0.5, 0.25, 0.25, -7.0]))
    assert tc.filters.within("difference", "sum", 1.0, 1.0)(known, one).all()
    assert tc.token_weights.within("difference", "mean", 0.25, 0.25)(known, one).tolist() == [[1.0]]


def test_a_scale_changes_the_gradient_and_no_denominator():
    batch, current = batch_and_policies()
    current = batch.shaped(current)
    low, high = 0.9, 1.2
    objective = tc.Objective(
        clip=tc.clip.unclipped(),
        scales=(tc.scale.within("ratio", "token", low, high),),
        aggregation=tc.aggregation.token_mean(),
    )

    def formula(batch, log_probs):
        losses = []
        for a, tokens in zip(naive.group_advantages(batch), naive.rows_of(batch), strict=True):
            q = [(log_probs[t] - batch.old_log_probs[t]).exp() for t in tokens]
            losses.append([-a * x if low <= x.item() <= high else 0 * x for x in q])
        return naive.token_mean(batch, losses)

    naive.check(objective, batch, current, formula)


def test_a_filter_changes_the_denominator_and_a_weight_does_not():
    batch, current = batch_and_policies()
    current = batch.shaped(current)
    settings = ("ratio", "token", 0.9, 1.2)
    mean = tc.aggregation.token_mean()
    filtered = tc.Objective(filters=(tc.filters.within(*settings),), aggregation=mean)
    weighted = tc.Objective(token_weights=(tc.token_weights.within(*settings),), aggregation=mean)
    a, b = filtered.prepare(batch), weighted.prepare(batch)
    kept, whole = int(a.lengths.sum()), int(batch.lengths.sum())
    assert 0 < kept < whole == b.lengths.sum()
    torch.testing.assert_close(filtered.loss(a, current).loss * kept, weighted.loss(b, current).loss * whole)
