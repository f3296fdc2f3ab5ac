import itertools
import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.trace import answer_progress, windowed


def scored_turns(batch, seed):
    """The batch with log-probs after all turns, or all but the last one of a row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.full((batch.num_tokens,), math.nan, dtype=torch.float64)
    for r, row in enumerate(naive.turns_of(batch)):
        for turn in row[: len(row) - r % 2]:
            x[turn[-1]] = -3 * torch.rand((), generator=g)
    return naive.with_inputs(batch.with_inputs(ref_answer_log_probs=x), {"ref_initial_answer_log_probs"}, seed)


@pytest.mark.parametrize("seed", range(3))
def test_formula(seed):
    def formula(batch, log_probs):
        after, first = (
            batch.extras["ref_answer_log_probs"].tolist(),
            batch.extras["ref_initial_answer_log_probs"].tolist(),
        )
        outcome = [0.0] * batch.num_rows
        for rows in naive.counted_rows(batch):
            mean, std = naive.moments([batch.rewards[r].item() for r in rows], population=True)
            for r in rows:
                outcome[r] = (batch.rewards[r].item() - mean) / (std + 1e-6)
        found = []
        for r, row in enumerate(naive.turns_of(batch)):
            boundaries = [first[r], *(x for turn in row if not math.isnan(x := after[turn[-1]]))]
            values = [math.log((0.1 - first[r]) / (0.1 - x)) for x in boundaries]
            delta = [b - a for a, b in itertools.pairwise(values)]
            credit = [outcome[r]] * len(row)
            for k in range(len(delta)):
                n = min(3, len(delta) - k)
                c = sum(0.8**i * delta[k + i] for i in range(n)) / sum(0.8**i for i in range(n))
                c += 2 * 0.8 ** (len(delta) - k) * outcome[r] if k + 3 >= len(delta) else 0
                credit[k] += 0.2 * c
            found.append(credit)
        advantages = naive.spread_turns(batch, found)
        return naive.sequence_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch(seed, length=9)
    naive.check(tc.methods.trace(), scored_turns(batch, seed), current, formula)


def test_by_hand():
    """Log-probs -2.3, -1.5, -1.6, -0.4, -0.1, four turns and one that answers, and an outcome of 0.57734927."""
    batch = tc.Rollouts(
        torch.arange(5),
        torch.tensor([0, 5]),
        torch.tensor([0]),
        torch.tensor([0.57734927], dtype=torch.float64),
        extras={
            "turn_ids": torch.arange(5),
            "ref_answer_log_probs": torch.tensor([-1.5, -1.6, -0.4, -0.1, math.nan], dtype=torch.float64),
            "ref_initial_answer_log_probs": torch.tensor([-2.3], dtype=torch.float64),
        },
    )
    # In a group of one the outcome is the reward.
    advantages = tc.methods.trace(epsilon=0.0).prepare(batch).advantages.tolist()
    assert advantages == pytest.approx([0.67080679, 0.81893645, 0.94257380, 0.94535918, 0.57734927], rel=1e-7)
    delta = torch.tensor([0.40546511, -0.06062462, 1.22377543, 0.91629073, 0], dtype=torch.float64)
    c = windowed(delta, batch.turns, torch.tensor([4]), torch.zeros(5, dtype=torch.float64), 0.8, 3)
    assert c[:4].tolist() == pytest.approx([0.46728758, 0.61673024, 1.08711557, 0.91629073], rel=1e-6)


def test_a_gap_is_an_error():
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(scored_turns(batch, 0), ())
    x = batch.extras["ref_answer_log_probs"].clone()
    x[next(row[0][-1] for row in naive.turns_of(batch) if len(row) > 2)] = math.nan
    with pytest.raises(ValueError, match="ref_answer_log_probs: expected them after every turn up to the last"):
        tc.methods.trace().prepare(batch.with_inputs(ref_answer_log_probs=x))


def test_defaults():
    assert tc.methods.trace() == tc.Objective(answer_progress(0.8, 3, 0.2, 1e-6), clip=tc.clip.ppo(0.2, 0.2))
