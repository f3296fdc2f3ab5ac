"""Returns and generalized advantages along trajectories, in one row or in several."""

import dataclasses
import itertools
import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.stages.credit.returns import last_tokens


def abc(**changes):
    """Three trajectories with turns of one token: rewards 0.2, 0, 1 | 0.5, 0 | 0.4."""
    arguments = {
        "tokens": torch.arange(6),
        "cu_seqlens": torch.tensor([0, 3, 5, 6]),
        "group_ids": torch.zeros(3, dtype=torch.long),
        "rewards": None,
        "token_rewards": torch.tensor([0.2, 0, 1, 0.5, 0, 0.4], dtype=torch.float64),
        "extras": {"turn_ids": torch.arange(6)},
    }
    return tc.Rollouts(**arguments | changes)


@pytest.mark.parametrize("unit", ["token", "turn"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"baseline": "inclusive"}, [0.5, 0.5, 0, -0.2, -0.5, -0.3]),
        ({"baseline": "others"}, [0.75, 1, 0, -0.3, -1, -0.45]),
        ({"baseline": "others", "alone": "raw"}, [0.75, 1, 1, -0.3, -1, -0.45]),
        ({"baseline": "inclusive", "zero_extended": True}, [0.5, 2 / 3, 2 / 3, -0.2, -1 / 3, -0.3]),
        ({"baseline": "others", "zero_extended": True}, [0.75, 1, 1, -0.3, -0.5, -0.45]),
        ({}, [1.2, 1, 1, 0.5, 0, 0.4]),
    ],
)
def test_baselines(unit, settings, expected):
    """To subtract means first and sum then would give -0.167 for the first turn of the best trajectory."""
    assert tc.credit.returns(unit=unit, **settings)(abc()).tolist() == pytest.approx(expected)


def test_scale_of_the_group():
    found = tc.credit.returns(unit="turn", baseline="inclusive", scale="group", epsilon=0.0)(abc())
    std = naive.moments([1.2, 0.5, 0.4])[1]
    assert found.tolist() == pytest.approx([x / std for x in (0.5, 0.5, 0, -0.2, -0.5, -0.3)])


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_of_a_group_of_equal_returns(dtype, epsilon):
    """Totals of 0.3 in three orders, which differ by rounding, are no standard deviation to divide by."""
    rewards = torch.tensor([0.1, 0.2, 0, 0.2, 0.1, 0, 0, 0.1 + 0.2, 0], dtype=dtype)
    batch = abc(
        tokens=torch.arange(9),
        cu_seqlens=torch.tensor([0, 3, 6, 9]),
        token_rewards=rewards,
        extras={"turn_ids": torch.arange(9)},
    )
    for baseline in ("others", "inclusive"):
        credit = tc.credit.returns(unit="turn", baseline=baseline, scale="group", epsilon=epsilon)
        assert credit(batch).tolist() == [0] * 9


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_missing_value_is_an_error(value):
    """What is masked is not read, and with turns only the first token of each."""
    values = torch.tensor([0.1, value, 0.3])
    batch = tc.Rollouts(
        torch.arange(3),
        torch.tensor([0, 3]),
        torch.zeros(1, dtype=torch.long),
        torch.ones(1),
        extras={"values": values, "turn_ids": torch.tensor([0, 0, 1])},
    )
    with pytest.raises(ValueError, match=f"values: expected finite numbers .* got {value}"):
        tc.methods.ppo().prepare(batch)
    assert tc.credit.gae(unit="turn")(batch).isfinite().all()
    masked = dataclasses.replace(batch, response_mask=torch.tensor([True, False, True]))
    assert tc.methods.ppo().prepare(masked).advantages.isfinite().all()
    cut = masked.with_inputs(bootstrap_values=torch.tensor([value]))
    with pytest.raises(ValueError, match=f"bootstrap_values: expected finite numbers, got {value}"):
        tc.credit.gae().targets(cut)


def gradient_of_going_on(credit, p, n):
    """Turn 1 has reward 0.5, then with probability p the agent goes on to turn 2, whose reward is 1.

    The expected total reward grows by 1 with p.

    Returns the mean over all groups of n of the advantage of the first turn times the derivative of the log-probability
    of what the agent did.
    """
    total = 0.0
    for on in itertools.product([False, True], repeat=n):
        tokens = [t for goes_on in on for t in ([0.5, 1.0] if goes_on else [0.5])]
        lengths = torch.tensor([0, *(1 + x for x in on)])
        batch = tc.Rollouts(
            torch.arange(len(tokens)),
            lengths.cumsum(0),
            torch.zeros(n, dtype=torch.long),
            None,
            token_rewards=torch.tensor(tokens, dtype=torch.float64),
            extras={"turn_ids": torch.arange(len(tokens))},
        )
        first = credit(batch)[batch.begin].tolist()
        probability = math.prod(p if x else 1 - p for x in on)
        slopes = [1 / p if x else -1 / (1 - p) for x in on]
        total += probability * sum(a * s for a, s in zip(first, slopes, strict=True)) / n
    return total


@pytest.mark.parametrize("p", [0.3, 0.8])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"baseline": "others"}, lambda n: 1.0),
        ({"baseline": "others", "zero_extended": True}, lambda n: 1.0),
        ({"baseline": "none"}, lambda n: 1.0),
        ({"baseline": "inclusive"}, lambda n: 1 - 1 / n),
    ],
)
def test_the_gradient_of_going_on_has_no_bias(p, n, settings, expected):
    assert gradient_of_going_on(tc.credit.returns(unit="turn", **settings), p, n) == pytest.approx(expected(n))


@pytest.mark.parametrize(("p", "expected"), [(0.3, 1.41559332), (0.5, 1.39951643)])
def test_a_divisor_of_the_group_keeps_the_sign_of_the_gradient(p, expected):
    credit = tc.credit.returns(unit="turn", baseline="inclusive", scale="group")
    assert gradient_of_going_on(credit, p, 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("discount", "expected"), [(0.9, [0.8452, 0.828, 0.92, 0.8, 1]), (1.0, [1.2, 1.1, 1.1, 0.9, 1])]
)
def test_dense_rewards_to_go(discount, expected):
    batch = tc.Rollouts(
        torch.arange(5),
        torch.tensor([0, 5]),
        torch.tensor([0]),
        None,
        token_rewards=torch.tensor([0.1, 0, 0.2, -0.1, 1]),
    )
    assert tc.credit.returns(discount)(batch).tolist() == pytest.approx(expected)


def test_a_reward_after_a_tool_call_reaches_the_tokens_before_it():
    for cut, ids in (([0, 3], [0]), ([0, 1, 3], [0, 0]), ([0, 2, 3], [0, 0])):
        rows = len(ids)
        batch = tc.Rollouts(
            torch.arange(3),
            torch.tensor(cut),
            torch.zeros(rows, dtype=torch.long),
            torch.ones(rows),
            torch.tensor([True, False, True]),
            trajectory_ids=torch.tensor(ids),
        )
        objective = tc.Objective(tc.credit.returns(0.5))
        assert objective.prepare(batch).advantages.tolist() == [0.5, 0, 1]


CUTS = [[0, 6], [0, 3, 6], [0, 1, 4, 6], [0, 2, 2, 6]]
ESTIMATES = [0.17973760, 0.19408, 0.464, 0.2]


def six(cut, **extras):
    """Decisions 0, 1, 4, 5 of which the second and the last have rewards 0.1 and 1; 9 and 7 lie under the mask."""
    rows = len(cut) - 1
    return tc.Rollouts(
        torch.arange(6),
        torch.tensor(cut),
        torch.zeros(rows, dtype=torch.long),
        None,
        torch.tensor([True, True, False, False, True, True]),
        token_rewards=torch.tensor([0, 0.1, 0, 0, 0, 1], dtype=torch.float64),
        trajectory_ids=torch.zeros(rows, dtype=torch.long),
        extras={"values": torch.tensor([0.5, 0.6, 9, 7, 0.4, 0.8], dtype=torch.float64), **extras},
    )


@pytest.mark.parametrize("cut", CUTS)
def test_generalized_advantages(cut):
    batch = six(cut)
    gae = tc.credit.gae(0.9, 0.8, target_trace=0.8)
    at = [0, 1, 4, 5]
    assert tc.Objective(gae).prepare(batch).advantages[at].tolist() == pytest.approx(ESTIMATES)
    assert gae.targets(batch)[at].tolist() == pytest.approx([0.6797376, 0.79408, 0.864, 1])
    # A trajectory that was cut goes on with the value after its last token.
    rows = torch.zeros(len(cut) - 1, dtype=torch.float64)
    rows[-1] = 0.3
    cut_short = tc.Objective(gae).prepare(six(cut, bootstrap_values=rows)).advantages[at].tolist()
    assert cut_short == pytest.approx([0.28051456, 0.334048, 0.6584, 0.47])
    whitened = tc.Objective(tc.credit.whitened(gae)).prepare(batch).advantages[at].tolist()
    assert whitened == pytest.approx([-0.58345505, -0.47848162, 1.49708924, -0.43515256], rel=1e-7)


def test_generalized_advantages_of_turns():
    """Turns with rewards 0.1 and 1 and the values 0.5 and 0.4 of their first tokens."""
    found = tc.Objective(tc.credit.gae(0.9, 0.8, unit="turn")).prepare(six([0, 2, 6])).advantages
    assert found.tolist() == pytest.approx([0.392, 0.392, 0, 0, 0.6, 0.6])


def test_values_are_required():
    batch = abc()
    with pytest.raises(ValueError, match="values: expected in the batch because the objective reads it, got None"):
        tc.methods.ppo().prepare(batch)


def test_last_tokens_skip_rows_without_any():
    mask = torch.tensor([True, True, False, False, False, True])
    rows, last = last_tokens(abc(response_mask=mask, token_rewards=None, rewards=torch.ones(3)))
    assert rows.tolist() == [0, 2] and last.tolist() == [1, 5]


@pytest.mark.parametrize("seed", range(3))
def test_a_lambda_for_each_row(seed):
    """Rows of many lengths; a lambda of exactly 0, tiny, and 1."""
    g = torch.Generator().manual_seed(seed)
    lengths = [0, 1, 2, 5, 17, 300, 3]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.rand(int(edges[-1]), generator=g) > 0.3
    spans = tc.Spans.from_cu_seqlens(edges, mask)
    values, rewards = (torch.randn(len(mask), generator=g, dtype=torch.float64) for _ in range(2))
    values[~mask] = math.nan
    traces = torch.tensor([0.5, 0, 1, 0.9, 1e-9, 0.99, 0.3], dtype=torch.float64)
    found = tc.scan.generalized_advantages(rewards, values, spans, 0.95, traces)
    for r, trace in enumerate(traces.tolist()):
        own = tc.scan.generalized_advantages(rewards, values, spans, 0.95, trace)
        row = slice(int(edges[r]), int(edges[r + 1]))
        torch.testing.assert_close(found[row], own[row])


def test_what_a_critic_learns_is_said_by_the_part_that_reads_values():
    batch, gae = six([0, 2, 6]), tc.credit.gae(0.9, 0.8, target_trace=0.8)
    expected = gae.targets(batch)
    for credit in (tc.credit.whitened(gae), tc.credit.sum(tc.credit.returns(), tc.credit.whitened(gae))):
        assert torch.equal(credit.targets(batch), expected)
    for credit in (tc.credit.returns(), tc.credit.sum(gae, gae)):
        with pytest.raises(ValueError, match=r"credit: expected one part that says what a critic learns, such as gae"):
            credit.targets(batch)
