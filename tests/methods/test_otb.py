import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.otb import optimal_baseline

INPUTS = {"squared_probs", "turn_rewards"}


def advantages(batch, rewards):
    """The paper's ``G - E[G W] / E[W]`` per time step, G and W written out as sums."""
    p, squares, tokens = (
        batch.old_log_probs.exp().tolist(),
        batch.extras["squared_probs"].tolist(),
        naive.rows_of(batch),
    )
    begin, out = batch.begin.tolist(), {}
    for rows in naive.group_rows(batch):
        to_go = {t: sum(rewards[r].get(s, 0.0) for s in tokens[r] if s >= t) for r in rows for t in tokens[r]}
        energy = {t: sum(1 - 2 * p[s] + squares[s] for s in tokens[r] if s <= t) for r in rows for t in tokens[r]}
        for r in rows:
            for t in tokens[r]:
                same = [begin[k] + t - begin[r] for k in rows if begin[k] + t - begin[r] in tokens[k]]
                mean = sum(to_go[s] * energy[s] for s in same) / (sum(energy[s] for s in same) + 1e-8)
                out[t] = to_go[t] - (mean if len(same) > 1 else 0.0)
    return out


@pytest.mark.parametrize("by_turn", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_formula(by_turn, seed):
    batch, current = naive.random_batch(seed, length=9)
    batch = naive.with_inputs(batch, INPUTS, seed)

    def formula(batch, log_probs):
        if by_turn:
            rewards = [{t: batch.extras["turn_rewards"][t].item() for t in row} for row in naive.rows_of(batch)]
        else:
            rewards = [
                {row[-1]: r} if row else {} for row, r in zip(naive.rows_of(batch), batch.rewards.tolist(), strict=True)
            ]
        credit = advantages(batch, rewards)
        ratio = lambda t: (log_probs[t] - batch.old_log_probs[t]).exp()  # noqa: E731
        losses = [[naive.clipped(credit[t], ratio(t), 0.8, 1.2) for t in row] for row in naive.rows_of(batch)]
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.otb(by_turn=by_turn), batch, current, formula)


def two_rollouts(**changes):
    """A row of two tokens of probability 1/2, and one of three: 1, 1/2, 1/2."""
    half = math.log(0.5)
    arguments = dict(
        rewards=torch.tensor([1.0, 0.0]),
        old_log_probs=torch.tensor([half, half, 0.0, half, half]),
        extras={"squared_probs": torch.tensor([0.5, 0.5, 1.0, 0.5, 0.5])},
    )
    return tc.Rollouts(
        torch.arange(5), torch.tensor([0, 2, 5]), torch.zeros(2, dtype=torch.long), **(arguments | changes)
    )


def test_by_hand():
    # Energies 0.5 1 and 0 0.5 1: the baseline is 1 where the second row has none, then 2/3, then the row is alone.
    credit = tc.methods.otb(epsilon=0.0).prepare(two_rollouts()).advantages
    assert credit.tolist() == pytest.approx([0, 1 / 3, -1, -2 / 3, 0], abs=1e-6)
    other = tc.methods.otb(epsilon=0.0).prepare(two_rollouts(rewards=torch.tensor([0.0, 1.0]))).advantages
    assert other.tolist() == pytest.approx([0, -1 / 3, 1, 2 / 3, 1], abs=1e-6)
    # Rewards of 1 for each row's first token and 3 for the second's last: to go 1 0 and 4 3 3.
    batch = two_rollouts(extras={"turn_rewards": torch.tensor([1.0, 0, 1, 0, 3])} | two_rollouts().extras)
    credit = tc.methods.otb(by_turn=True, epsilon=0.0).prepare(batch).advantages
    assert credit.tolist() == pytest.approx([0, -1, 3, 2, 3], abs=1e-6)


def test_precisions_of_inputs_may_differ():
    exact = tc.methods.otb().prepare(two_rollouts()).advantages
    batch = two_rollouts(extras={"squared_probs": two_rollouts().extras["squared_probs"].bfloat16()})
    torch.testing.assert_close(tc.methods.otb().prepare(batch).advantages, exact)
    batch = two_rollouts(rewards=torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(tc.methods.otb().prepare(batch).advantages, exact.double())


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match="squared_probs: expected in the batch"):
        tc.methods.otb().prepare(two_rollouts(extras={}))
    with pytest.raises(ValueError, match="turn_rewards: expected in the batch"):
        tc.methods.otb(by_turn=True).prepare(two_rollouts())


def test_defaults():
    assert tc.methods.otb() == tc.Objective(
        credit=optimal_baseline(by_turn=False, epsilon=1e-8), aggregation=tc.aggregation.token_mean()
    )
