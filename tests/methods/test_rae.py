import json

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.rae import RoleBaselines, above_role


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_formula(discount):
    def formula(batch, log_probs):
        total, found = naive.total_rewards(batch), []
        for r, row in enumerate(naive.turns_of(batch)):
            above = total[r] - batch.extras["role_baselines"][r].item()
            found.append([above * discount ** (len(row) - 1 - k) for k in range(len(row))])
        advantages = naive.spread_turns(batch, found)
        return naive.sequence_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"role_baselines", "token_rewards"})
    naive.check(tc.methods.rae(discount=discount), batch, current, formula)


def games(rewards, roles, groups=None, **changes):
    rows = len(rewards)
    return tc.Rollouts(
        torch.arange(rows),
        torch.arange(rows + 1),
        torch.tensor(groups or range(rows)),
        torch.tensor(rewards, dtype=torch.float64),
        extras={"role_ids": torch.tensor(roles)},
        **changes,
    )


def test_by_hand():
    baselines = RoleBaselines()
    first = baselines(games([1.0, -1.0], [3, 3]))
    second = baselines(games([1.0, 0.5, 1.0], [3, 4, 3]))
    advantages = [tc.methods.rae().prepare(batch).advantages.tolist() for batch in (first, second)]
    assert advantages[0] == pytest.approx([1, -1.05])
    assert advantages[1] == pytest.approx([1.0025, 0.5, 0.952375])
    assert baselines.state_dict() == pytest.approx({3: 0.09524375, 4: 0.025})
    again = RoleBaselines()
    again.load_state_dict(baselines.state_dict())
    assert again(games([0.0], [3])).input("role_baselines").tolist() == pytest.approx([0.09524375])


def test_each_trajectory_moves_a_baseline_once():
    """Whether in one row or in two; one without a decision does not move it."""
    moved = []
    for rewards, ids in (([1.0, 2.0, 5.0], [0, 1, 2]), ([1.0, 1.0, 2.0, 5.0], [0, 0, 1, 2])):
        rows = len(ids)
        mask = torch.arange(rows) < rows - 1
        batch = games(rewards, [7] * rows, response_mask=mask, groups=ids, trajectory_ids=torch.tensor(ids))
        baselines = RoleBaselines(0.5)
        found = baselines(batch).input("role_baselines").tolist()
        moved.append((found[0], found[-2], baselines.state_dict()))
    assert moved[0] == moved[1] == (0.0, 0.5, {7: 1.25})


def test_state_survives_json():
    baselines = RoleBaselines()
    baselines(games([1.0], [3]))
    again = RoleBaselines()
    again.load_state_dict(json.loads(json.dumps(baselines.state_dict())))
    assert again.state_dict() == baselines.state_dict() == pytest.approx({3: 0.05})


def test_decay_is_checked():
    with pytest.raises(ValueError, match="decay: expected a number from 0 to 1, got 2"):
        RoleBaselines(2)


def test_defaults():
    assert tc.methods.rae() == tc.Objective(
        above_role(1.0), filters=(tc.filters.nonzero_advantage(),), clip=tc.clip.ppo(0.2, 0.2)
    )
