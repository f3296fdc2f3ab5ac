import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.turn_progress import progress


@pytest.mark.parametrize("seed", range(3))
def test_formula(seed):
    def formula(batch, log_probs):
        of_rows, scores = naive.group_advantages(batch), batch.extras["turn_scores"].tolist()
        found = []
        for r, row in enumerate(naive.turns_of(batch)):
            credit, last = [of_rows[r]] * len(row), None
            for k, turn in enumerate(row):
                s = scores[turn[-1]]
                if math.isnan(s):
                    continue
                if last is not None:
                    total = sum(0.8**d for d in range(k + 1))
                    for i in range(k + 1):
                        credit[i] += 0.5 * (s - last) * 0.8 ** (k - i) / total
                last = s
            found.append(credit)
        advantages = naive.spread_turns(batch, found)
        return naive.sequence_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch(seed, length=9)
    batch = naive.with_inputs(batch, {"turn_scores"}, seed)
    naive.check(tc.methods.turn_progress(discount=0.8, weight=0.5), batch, current, formula)


@pytest.mark.parametrize(
    ("discount", "expected"),
    [
        (0.5, [0.05576037, 0.11152074, 0.22304147, 0.10322581, 0.20645161]),
        (0.9, [0.15375424, 0.17083805, 0.18982005, 0.08790994, 0.09767771]),
    ],
)
def test_by_hand(discount, expected):
    """Scores 0.2, none, 0.5, 0.5, 0.9: the changes are 0, 0, 0.3, 0, 0.4."""
    batch = tc.Rollouts(
        torch.arange(5),
        torch.tensor([0, 5]),
        torch.tensor([0]),
        torch.tensor([0.0]),
        extras={
            "turn_ids": torch.arange(5),
            "turn_scores": torch.tensor([0.2, math.nan, 0.5, 0.5, 0.9], dtype=torch.float64),
        },
    )
    found = progress(discount)(batch)
    assert found.tolist() == pytest.approx(expected, rel=1e-6) and found.sum().item() == pytest.approx(0.7)
    alone = batch.with_inputs(turn_scores=torch.tensor([math.nan, 0.5] + [math.nan] * 3))
    assert progress(discount)(alone).tolist() == [0.0] * 5
    # A weight of 0 gives exactly the other credit.
    objective = tc.methods.turn_progress(discount, weight=0.0)
    assert torch.equal(objective.prepare(batch).advantages, tc.methods.grpo().prepare(batch).advantages)


def test_defaults():
    assert tc.methods.turn_progress() == tc.Objective(
        tc.credit.sum(tc.credit.group_normalized(epsilon=1e-6), progress(0.9), 1.0), clip=tc.clip.ppo(0.2, 0.2)
    )
