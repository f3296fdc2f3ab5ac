import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.gdpo import batch_normalized, component_normalized

TWO = torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 0]], dtype=torch.float64)


def batch_of(rewards):
    """Four responses of one prompt, of 4, 2, 2 and 2 tokens."""
    return tc.Rollouts(torch.arange(10), torch.tensor([0, 4, 6, 8, 10]), torch.zeros(4, dtype=torch.long), rewards)


@pytest.mark.parametrize("over_tokens", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_formula(over_tokens, dense):
    def formula(batch, log_probs):
        tokens, columns = naive.rows_of(batch), [*batch.rewards.unbind(1)]
        if dense:
            columns.append([sum(batch.token_rewards[t].item() for t in row) for row in tokens])
        total = [0.0] * batch.num_rows
        for column in columns:
            for rows in naive.counted_rows(batch):
                mean, std = naive.moments([float(column[r]) for r in rows])
                for r in rows:
                    total[r] += (float(column[r]) - mean) / (std + 1e-6)
        if over_tokens:
            advantages = naive.whitened({t: total[r] for r, row in enumerate(tokens) for t in row})
        else:
            mean, std = naive.moments([total[r] for r, row in enumerate(tokens) if row])
            advantages = {t: (total[r] - mean) / (std + 1e-4) for r, row in enumerate(tokens) for t in row}
        return naive.token_mean(batch, naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch()
    further = torch.rand(batch.num_rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = tc.Rollouts.from_padded(
        batch.shaped(batch.tokens),
        batch.shaped(batch.response_mask),
        batch.group_ids,
        torch.cat([batch.rewards[:, None], 300 * further], 1),
        old_log_probs=batch.shaped(batch.old_log_probs),
    )
    batch = naive.with_inputs(batch, {"token_rewards"} if dense else set())
    naive.check(tc.methods.gdpo(over_tokens=over_tokens), batch, current, formula)


def test_by_hand():
    batch = batch_of(TWO)
    assert component_normalized()(batch)[:, 0].tolist() == pytest.approx(
        [0.3660249, 2.3660209, -1.3660229, -1.3660229], abs=1e-7
    )
    of_rows = tc.methods.gdpo(epsilon=1e-4).prepare(batch).advantages[[0, 4, 6, 8]].tolist()
    assert of_rows == pytest.approx([0.20607695, 1.33203096, -0.76905395, -0.76905395], rel=1e-7)
    of_tokens = tc.methods.gdpo(over_tokens=True).prepare(batch).advantages[[0, 4, 6, 8]].tolist()
    assert of_tokens == pytest.approx([0.20078102, 1.57213998, -0.98685101, -0.98685101], rel=1e-7)
    grpo = tc.methods.grpo().prepare(batch).advantages[[0, 4, 6, 8]].tolist()
    assert grpo == pytest.approx([0.26111621, 1.30558106, -0.78334863, -0.78334863], rel=1e-7)


def test_a_single_pair_has_the_same_advantages_whatever_its_rewards():
    batch = tc.Rollouts(torch.arange(2), torch.arange(3), torch.zeros(2, dtype=torch.long), torch.tensor([9.0, 8.9]))
    advantages = tc.methods.gdpo().prepare(batch).advantages.tolist()
    assert advantages == pytest.approx([0.7071, -0.7071], abs=1e-3)


def test_rewards_of_constant_sum_cancel():
    """Whatever their scale: a reward of up to 300 weighs as much as one of up to 1."""
    rewards = torch.stack([TWO[:, 0], 1 - TWO[:, 0]], 1)
    assert not tc.methods.gdpo().prepare(batch_of(rewards)).advantages.any()
    large = component_normalized()(batch_of(TWO * torch.tensor([300.0, 1.0])))
    torch.testing.assert_close(large, component_normalized()(batch_of(TWO)), rtol=1e-5, atol=0)


def test_components_are_weighed_with_sums():
    batch = batch_of(TWO)
    weighed = tc.credit.sum(component_normalized(0), component_normalized(1), 2.0)
    expected = component_normalized(0)(batch) + 2 * component_normalized(1)(batch)
    torch.testing.assert_close(weighed(batch), expected)
    text = "batch_normalized(sum(component_normalized(0), component_normalized(1), 2.0))"
    assert tc.mix("gdpo", credit=text).credit == batch_normalized(weighed)
    with pytest.raises(ValueError, match="rewards: expected more than 2 of them because of component_normalized"):
        component_normalized(2)(batch)


def test_defaults():
    assert tc.methods.gdpo() == tc.Objective(
        batch_normalized(component_normalized(None, 1e-6), 1e-4),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.token_mean(),
    )
