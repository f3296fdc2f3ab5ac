"""Rows of a host as trajectories: the four meanings of a row's reward, without a host."""

import pytest
import tokcredit as tc
import torch
from tokcredit.adapters import two_phase
from tokcredit.adapters.rows import REWARD_RULES, Fields, host_rows

FIELDS = Fields("session", "uid", "scores", "index")
# Session a has rows 0 and 2, b has row 1; the last token of row 0 is one of a tool.
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])


def rows_of(rewards, rule, **changes):
    given = dict(trajectories="aba", groups=[5, 5, 5], rewards=torch.tensor(rewards), response_mask=MASK) | changes
    return host_rows(**given, rule=rule, fields=FIELDS)


@pytest.mark.parametrize(
    ("rule", "rewards", "total"),
    [
        ("same", [2.0, 7.0, 2.0], [2.0, 7.0, 2.0]),
        ("last", [9.0, 7.0, 2.0], [2.0, 7.0, 2.0]),
        ("split", [1.0, 7.0, 1.0], [2.0, 7.0, 2.0]),
    ],
)
def test_outcomes(rule, rewards, total):
    found = rows_of(rewards, rule)
    assert found.trajectory_ids.tolist() == [0, 1, 0] and found.order is None and found.token_rewards is None
    assert found.rewards.tolist() == total
    dense = torch.zeros(3, 3)
    dense[:, 2] = torch.tensor(rewards)
    assert rows_of(dense.tolist(), rule).rewards.tolist() == total


def test_sums():
    """A reward of a row is at its last chosen token; that of a tool's token moves to the chosen one before it."""
    expected = [[0.0, 4.0, 0.0], [0.0, 0.0, 7.0], [0.0, 0.0, 2.0]]
    found = rows_of([4.0, 7.0, 2.0], "sum")
    assert found.rewards is None and found.token_rewards.tolist() == expected
    moved = rows_of([[1.0, 0.5, 2.0], [0.0, 0.0, 7.0], [0.25, 0.0, 2.0]], "sum").token_rewards
    assert moved.tolist() == [[1.0, 2.75, 0.0], [0.0, 0.0, 7.0], [0.0, 0.0, 2.0]]


def test_a_reward_before_the_first_chosen_token():
    """It moves to the first one after it, and nowhere in a trajectory without one."""
    mask = torch.tensor([[0, 0], [0, 1], [0, 0]])
    found = rows_of([[3.0, 0.0], [0.0, 1.0], [5.0, 0.0]], "sum", trajectories="aab", response_mask=mask)
    assert found.token_rewards.tolist() == [[0.0, 0.0], [0.0, 4.0], [0.0, 0.0]]
    assert rows_of([3.0, 1.0, 2.0], "sum", response_mask=torch.zeros(3, 0)).token_rewards.shape == (3, 0)


def test_places():
    """Rows may be stored in any order; the last row is that of the largest place."""
    found = rows_of([9.0, 7.0, 2.0], "last", places=[3, 0, 1])
    assert found.rewards.tolist() == [9.0, 7.0, 9.0]
    order = found.order.tolist()
    assert order.index(2) < order.index(0)
    moved = rows_of([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]], "sum", places=[0, 0, -1]).token_rewards
    assert moved[2].tolist() == [0.0, 3.0, 0.0], "row 2 is the first, so no chosen token precedes"
    assert rows_of([9.0, 7.0, 2.0], "last", places=[1, 0, 3]).order is None


@pytest.mark.parametrize("rule", REWARD_RULES)
def test_shares_of_any_number_of_rows(rule):
    """Rewards of trajectories of 1 to 60 rows are exactly the same, so that equal ones have no advantage."""
    names = [k for k in range(1, 61) for _ in range(k)]
    values = torch.tensor([{"split": 1 / k, "sum": 1.0}.get(rule, 1.0) for k in names], dtype=torch.float64)
    mask = torch.ones(len(names), 1)
    found = host_rows(names, [0] * len(names), values, mask, rule, FIELDS)
    assert found.trajectory_ids.unique().numel() == 60
    assert found.rewards is None or found.rewards.eq(1.0).all()


def test_advantages_do_not_depend_on_the_rows():
    """One trajectory cut in two, in the wrong order, beside a whole one."""
    part = two_phase.advantage_part(tc.Objective(tc.credit.returns(discount=0.5)), "host")
    rows = rows_of([[4.0, 0, 0], [0, 0, 8.0], [1.0, 0, 2.0]], "sum", places=[1, 0, 0], response_mask=torch.ones(3, 3))
    tokens = torch.arange(9).view(3, 3)
    found = two_phase.advantages_padded(
        part, tokens, torch.ones(3, 3), torch.ones(3, 3), torch.zeros(3).long(), rows, "h"
    )
    assert found[0].tolist() == [4.0, 0.0, 0.0]
    assert found[1].tolist() == [2.0, 4.0, 8.0]
    assert found[2].tolist() == [1 + 0.5 + 0.5, 2.0, 4.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [5, 5, 6]}, "uid: expected one group in all rows of session 'a', got 6 in row 2 beside 5 in row 0"),
        (
            {"rewards": torch.tensor([1.0, 0.0, 2.0])},
            r"scores: expected the same reward \(reward_rule 'same'\) in all rows of session 'a', got 2.0 in row 2",
        ),
        ({"rule": "split", "rewards": torch.tensor([1.0, 0.0, 2.0])}, "the same reward .reward_rule 'split'"),
        ({"rewards": torch.tensor([1.0, float("nan"), 1.0])}, "scores: expected finite numbers, got nan in row 1"),
        ({"places": [4, 0, 4]}, "index: expected another number in each row of session 'a', got 4 in rows 0 and 2"),
        ({"rule": "mean"}, "reward_rule: expected one of same, last, split, sum, got 'mean'"),
    ],
)
def test_bad_rows(changes, message):
    given = dict(trajectories="aba", groups=[5, 5, 5], rewards=torch.ones(3), response_mask=MASK, rule="same")
    with pytest.raises(ValueError, match=message):
        host_rows(**(given | changes), fields=FIELDS)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            tc.methods.ctpo(),
            "expected a loss of single tokens, because host passes the rows of a trajectory one by one",
        ),
        (tc.methods.grpo(), "expected an aggregation stage over tokens, because host averages over rows"),
        (tc.mix("gspo", aggregation="token_mean()"), "expected a loss of single tokens"),
    ],
)
def test_losses_of_rows_that_are_cut(objective, message):
    two_phase.require_rows_cut(two_phase.loss_part(tc.methods.dapo(), "host", "beta"), "host")
    with pytest.raises(ValueError, match=message):
        two_phase.require_rows_cut(two_phase.loss_part(objective, "host", "beta"), "host")
