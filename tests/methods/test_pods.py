import itertools
from fractions import Fraction

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.pods import most_varied


def variance(x):
    mean = sum(x) / len(x)
    return sum((y - mean) ** 2 for y in x) / len(x)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_formula(count, seed):
    """Every subset is tried; rewards differ, so that the best one is unique."""

    def formula(batch, log_probs):
        rewards, advantages, kept = batch.rewards.tolist(), [0.0] * batch.num_rows, set()
        for rows in naive.counted_rows(batch):
            best = max(itertools.combinations(rows, count), key=lambda s: variance([rewards[r] for r in s]))
            mean = sum(rewards[r] for r in best) / count
            std = (variance([rewards[r] for r in best]) * count / (count - 1)) ** 0.5
            for r in best:
                advantages[r] = (rewards[r] - mean) / (std + 1e-4)
            kept |= set(best)
        losses = naive.ppo(batch, log_probs, advantages, 0.8, 1.2)
        return naive.sequence_mean(batch, [row if r in kept else [] for r, row in enumerate(losses)])

    batch, current = naive.random_batch(seed)
    batch.rewards.copy_(torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    naive.check(tc.methods.pods(count), batch, current, formula)


def test_by_hand():
    batch = tc.Rollouts(
        torch.arange(6),
        torch.arange(7),
        torch.zeros(6, dtype=torch.long),
        torch.tensor([1.5, 0.5, 0.4, 0.3, -0.2, -2.5]),
    )
    prepared = tc.methods.pods(3).prepare(batch)
    # 1.5, 0.5 and -2.5 are kept: mean -1/6, sample std 2.08167.
    assert prepared.mask.tolist() == [True, True, False, False, False, True]
    assert prepared.advantages.tolist() == pytest.approx([0.80060, 0.32024, 0, 0, 0, -1.12084], abs=1e-5)
    assert prepared.row_weights.unique().tolist() == pytest.approx([1 / 3])
    assert prepared.has_gradient.tolist() == [True, True, False, False, False, True]


def test_small_groups_are_kept_whole():
    batch, current = naive.random_batch()
    a, b = (
        objective.loss(objective.prepare(batch), current).loss
        for objective in (tc.methods.pods(), tc.methods.grpo(epsilon=1e-4))
    )
    torch.testing.assert_close(a, b)


def released(rewards, count):
    """The rule of the released code, with exact variances: the highest rewards win ties, then the first split."""
    order = sorted(range(len(rewards)), key=lambda r: -rewards[r])
    best = order[:count]
    for i in range(count):
        split = order[:i] + order[len(order) - (count - i) :]
        if variance([rewards[r] for r in split]) > variance([rewards[r] for r in best]):
            best = split
    return sorted(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_are_broken_as_in_the_release(dtype):
    g = torch.Generator().manual_seed(0)
    ties = 0
    for _ in range(200):
        n, count = int(torch.randint(4, 12, (1,), generator=g)), int(torch.randint(1, 5, (1,), generator=g))
        rewards = [Fraction(int(x)) for x in torch.randint(0, 3, (n,), generator=g)]
        batch = tc.Rollouts(
            torch.arange(n),
            torch.arange(n + 1),
            torch.zeros(n, dtype=torch.long),
            torch.tensor(list(map(float, rewards)), dtype=dtype),
        )
        kept = most_varied(count)(batch, None)[:, 0].nonzero()[:, 0].tolist()
        assert kept == released(rewards, count)
        ties += kept != tc.select.maximum_variance(batch.rewards, count).nonzero()[:, 0].tolist()
    assert ties > 20, "the first split would have been another set"


def test_ties_by_hand():
    # {1, 0, 0} three times: the highest three are taken, in the order of the batch. {2, 0} has no rival.
    for rewards, count, expected in (
        ([0.0, 1, 0, 0], 3, [0, 1, 2]),
        ([1.0, 0, 1, 2], 2, [1, 3]),
        ([5.0] * 4, 2, [0, 1]),
    ):
        batch = tc.Rollouts(torch.arange(4), torch.arange(5), torch.zeros(4, dtype=torch.long), torch.tensor(rewards))
        assert tc.methods.pods(count).prepare(batch).mask.nonzero()[:, 0].tolist() == expected


def test_defaults():
    assert tc.methods.pods() == tc.Objective(
        credit=tc.credit.group_normalized(epsilon=1e-4), filters=(most_varied(count=16),)
    )
