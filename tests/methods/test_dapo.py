import naive
import pytest
import tokcredit as tc


@pytest.mark.parametrize("seed", range(3))
def test_formula(seed):
    def formula(batch, log_probs):
        return naive.token_mean(batch, naive.ppo(batch, log_probs, naive.group_advantages(batch), 0.8, 1.28))

    naive.check(tc.methods.dapo(), *naive.random_batch(seed), formula)


def test_by_hand():
    # One positive token at ratio 1.5 is stopped at 1.28, one negative at 0.5 at 0.8; mean over the two tokens.
    import torch

    batch = tc.Rollouts(
        torch.arange(2),
        torch.tensor([0, 1, 2]),
        torch.zeros(2, dtype=torch.long),
        torch.tensor([1.0, 0.0]),
        old_log_probs=torch.zeros(2),
    )
    objective = tc.methods.dapo()
    log_probs = torch.tensor([1.5, 0.5]).log().requires_grad_()
    out = objective.loss(objective.prepare(batch), log_probs)
    assert out.loss.item() == pytest.approx((-1.28 + 0.8) / 2 * 0.5 / 0.5**0.5, abs=1e-5)
    out.loss.backward()
    assert log_probs.grad.tolist() == [0.0, 0.0]


def test_defaults():
    assert tc.methods.dapo() == tc.Objective(
        clip=tc.clip.ppo(low=0.2, high=0.28, cap=None), aggregation=tc.aggregation.token_mean()
    )
