import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.grpo_s import mean_entropy_shaped


def test_formula():
    def formula(batch, log_probs):
        rows = naive.rows_of(batch)
        advantages = [0.0] * batch.num_rows
        for group in naive.counted_rows(batch):
            for correct in (True, False):
                own = [r for r in group if (batch.rewards[r] > 0.5) == correct]
                mean = {r: sum(batch.entropies[t].item() for t in rows[r]) / len(rows[r]) for r in own}
                x = mean if correct else {r: 1 / (h + 1e-8) for r, h in mean.items()}
                share = {r: 0.2 * len(own) * y / sum(x.values()) for r, y in x.items()}
                rewards = {r: 0.9 * batch.rewards[r].item() + y if correct else -0.9 - y for r, y in share.items()}
                if len(own) > 1:
                    centre = sum(rewards.values()) / len(own)
                    std = (sum((r - centre) ** 2 for r in rewards.values()) / len(own)) ** 0.5
                    for r in own:
                        advantages[r] = (rewards[r] - centre) / std
        return naive.token_mean(batch, naive.ppo(batch, log_probs, advantages, 0.8, 1.28))

    batch, current = naive.random_batch()
    naive.check(tc.methods.grpo_s(0.9, 0.2), naive.with_inputs(batch, {"entropies"}), current, formula)


def test_by_hand():
    # Mean entropies 0.6 and 0.4, and 0.3 and 0.383: rewards 1.12 1.08 and -1.112 -1.088.
    entropies = torch.tensor(
        [[0.2, 0.6, 1, 9], [0.6, 0.2, 9, 9], [0.5, 0.1, 9, 9], [0.25, 0.4, 0.5, 9]], dtype=torch.float64
    )
    tokens = torch.zeros(4, 4, dtype=torch.long)
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    batch = tc.Rollouts.from_padded(tokens, entropies < 9, tokens[:, 0], rewards, entropies=entropies)
    assert mean_entropy_shaped()(batch)[:, 0].tolist() == pytest.approx([1, -1, -1, 1])
    # Three correct rows with means .6, .4 and .1.
    more = batch.with_rewards(torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    means = [0.6, 0.4, 0.383333]
    shaped = [1 + 0.1 * 3 * h / sum(means) for h in means]
    centre = sum(shaped) / 3
    std = (sum((r - centre) ** 2 for r in shaped) / 3) ** 0.5
    expected = [(r - centre) / std for r in shaped]
    found = mean_entropy_shaped()(more)[:, 0].tolist()
    assert found == pytest.approx([expected[0], expected[1], 0, expected[2]], abs=1e-5)


def test_defaults():
    assert tc.methods.grpo_s() == tc.Objective(
        mean_entropy_shaped(1.0, 0.1, 0.5), clip=tc.clip.ppo(0.2, 0.28), aggregation=tc.aggregation.token_mean()
    )
