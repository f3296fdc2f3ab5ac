import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cap", [None, 1.3])
def test_formula(seed, cap):
    def formula(batch, log_probs):
        losses = naive.ppo(batch, log_probs, naive.group_advantages(batch), 0.8, 1.3, cap)
        return naive.sequence_mean(batch, losses)

    out = naive.check(tc.methods.grpo(clip_high=0.3, cap=cap), *naive.random_batch(seed), formula)
    assert out.metrics["clip_low_fraction"] > 0 and out.metrics["clip_high_fraction"] > 0


def test_by_hand():
    batch = tc.Rollouts(
        torch.arange(3), torch.tensor([0, 1, 3]), torch.zeros(2, dtype=torch.long), torch.tensor([1.0, 0.0])
    )
    prepared = tc.methods.grpo().prepare(batch)
    # mean 0.5, sample std 0.7071: +-0.5 / 0.7071
    assert prepared.advantages.tolist() == pytest.approx([0.70711, -0.70711, -0.70711], abs=1e-5)
    log_probs = torch.zeros(3, requires_grad=True)
    tc.methods.grpo().loss(prepared, log_probs).loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-0.35355, 0.17678, 0.17678], abs=1e-5)


def test_group_of_one_is_paid_its_reward_and_equal_rewards_nothing():
    batch = tc.Rollouts(
        torch.arange(3), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1]), torch.tensor([2.0, 3.0, 3.0])
    )
    assert tc.methods.grpo().prepare(batch).advantages.tolist() == pytest.approx([2.0, 0.0, 0.0], abs=1e-5)
    assert tc.methods.grpo().prepare(batch).has_gradient.tolist() == [True, False, False]
