import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.gtpo import entropy_shaped


def test_formula():
    def advantages(batch):
        found = {}
        for rows in naive.counted_rows(batch):
            for correct in (True, False):
                judged = [r for r in rows if (batch.rewards[r] > 0.5) == correct]
                own = [naive.rows_of(batch)[r] for r in judged]
                rewards = {}
                for row, tokens in zip(judged, own, strict=True):
                    for k, t in enumerate(tokens):
                        alive = [other[k] for other in own if len(other) > k]
                        x = {u: batch.entropies[u].item() for u in alive}
                        x = x if correct else {u: 1 / (h + 1e-8) for u, h in x.items()}
                        share = 0.2 * len(alive) * x[t] / sum(x.values())
                        rewards[t] = 0.9 * batch.rewards[row].item() + share if correct else -0.9 - share
                if rewards:
                    mean = sum(rewards.values()) / len(rewards)
                    std = (sum((r - mean) ** 2 for r in rewards.values()) / len(rewards)) ** 0.5
                    found.update({t: (r - mean) / std if std > 1e-12 else 0.0 for t, r in rewards.items()})
        return found

    def formula(batch, log_probs):
        a = advantages(batch)
        return naive.token_mean(
            batch,
            [
                [naive.clipped(a[t], (log_probs[t] - batch.old_log_probs[t]).exp(), 0.8, 1.28) for t in tokens]
                for tokens in naive.rows_of(batch)
            ],
        )

    batch, current = naive.random_batch()
    naive.check(tc.methods.gtpo(0.9, 0.2), naive.with_inputs(batch, {"entropies"}), current, formula)


def hand():
    entropies = torch.tensor(
        [[0.2, 0.6, 1, 9], [0.6, 0.2, 9, 9], [0.5, 0.1, 9, 9], [0.25, 0.4, 0.5, 9]], dtype=torch.float64
    )
    mask = entropies < 9
    tokens = torch.zeros(4, 4, dtype=torch.long)
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    return tc.Rollouts.from_padded(tokens, mask, tokens[:, 0], rewards, entropies=entropies)


def test_by_hand():
    # Rewards 1.05 1.15 1.1 and 1.15 1.05; -1.067 -1.16 and -1.133 -1.04 -1.1.
    batch = hand()
    found = tc.methods.gtpo().prepare(batch).advantages[batch.shaped(batch.response_mask)]
    s = 1.118034
    assert found.tolist() == pytest.approx([-s, s, 0, s, -s, 0.767869, -1.382164, -0.767869, 1.382164, 0], abs=1e-5)


def test_equal_rewards_of_a_side_have_no_advantage():
    batch = hand()
    same = batch.with_inputs(entropies=torch.full((16,), 0.3, dtype=torch.float64))
    assert not tc.methods.gtpo().prepare(same).advantages.any()


@pytest.mark.parametrize("rows", [8, 16, 32])
def test_rounding_is_no_advantage(rows):
    """Equal rows: shares differ from one in the last digit, which must not be divided by its own size."""
    tokens = torch.zeros(rows, 20, dtype=torch.long)
    entropies = torch.linspace(0.1, 0.9, 20, dtype=torch.float64).expand(rows, 20)
    rewards = torch.zeros(rows, dtype=torch.float64)
    batch = tc.Rollouts.from_padded(tokens, tokens == 0, tokens[:, 0], rewards, entropies=entropies)
    for name in ("gtpo", "grpo_s"):
        assert not tc.methods.load(name).prepare(batch).advantages.any()


def test_entropies_of_0_and_nan():
    batch = hand()
    certain = batch.entropies.clone()
    certain[[2, 3]] = 0.0  # the only correct token at the third position
    advantages = tc.methods.gtpo().prepare(batch.with_inputs(entropies=certain)).advantages
    assert advantages[0, :3].count_nonzero() > 1 and advantages.isfinite().all()
    for name in ("gtpo", "grpo_s"):
        unknown = batch.entropies.clone()
        unknown[0] = math.nan
        found = tc.methods.load(name).prepare(batch.with_inputs(entropies=unknown)).advantages
        assert found[:2][batch.shaped(batch.response_mask)[:2]].isnan().all()
        assert found[2:].isfinite().all(), "the other side does not depend on it"


def test_defaults():
    assert tc.methods.gtpo() == tc.Objective(
        entropy_shaped(1.0, 0.1, 0.5), clip=tc.clip.ppo(0.2, 0.28), aggregation=tc.aggregation.token_mean()
    )
