import dataclasses

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.max_rl import relative


def batch_of(rewards):
    rows = len(rewards)
    return tc.Rollouts(
        torch.arange(rows), torch.arange(rows + 1), torch.zeros(rows, dtype=torch.long), torch.tensor(rewards).double()
    )


def test_formula():
    def formula(batch, log_probs):
        rewards, advantages = batch.rewards.tolist(), [0.0] * batch.num_rows
        for rows in naive.counted_rows(batch):
            mean = sum(rewards[r] for r in rows) / len(rows)
            for r in rows:
                advantages[r] = (rewards[r] - mean) / mean
        return naive.sequence_mean(batch, naive.ppo(batch, log_probs, advantages, 0.8, 1.2))

    naive.check(tc.methods.max_rl(), *naive.random_batch(), formula)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 0, 0, 0], [3, -1, -1, -1]),
        ([1.0, 1, 1, 0], [1 / 3, 1 / 3, 1 / 3, -1]),
        ([1.0, 0.5, 0], [1, 0, -1]),
        ([0.0, 0, 0], [0, 0, 0]),
        ([1.0], [0]),
    ],
)
def test_by_hand(rewards, expected):
    assert tc.methods.max_rl().prepare(batch_of(rewards)).advantages.tolist() == pytest.approx(expected)


def test_negative_rewards_are_an_error():
    with pytest.raises(ValueError, match=r"rewards: expected at least 0 for max_rl, got -0\.5"):
        tc.methods.max_rl().prepare(batch_of([1.0, -0.5]))


def test_a_negative_reward_of_an_empty_trajectory_is_not_read():
    batch = dataclasses.replace(batch_of([1.0, 0.0, -1.0]), response_mask=torch.tensor([True, True, False]))
    assert tc.methods.max_rl().prepare(batch).advantages.tolist() == [1, -1, 0]


def test_defaults():
    assert tc.methods.max_rl() == tc.Objective(relative(), clip=tc.clip.ppo(0.2, 0.2))
