import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("dense", [False, True])
def test_formula(dense):
    def formula(batch, log_probs):
        rewards, advantages = naive.token_rewards(batch), {}
        for row in naive.rows_of(batch):
            own = [rewards[t] - 0.1 * (batch.old_log_probs[t] - batch.ref_log_probs[t]).item() for t in row]
            advantages |= dict(zip(row, naive.to_go(own, 0.9), strict=True))
        return naive.token_mean(batch, naive.token_ppo(batch, log_probs, naive.whitened(advantages), 0.8, 1.2))

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"ref_log_probs", *(["token_rewards"] if dense else [])})
    naive.check(tc.methods.reinforce_pp(discount=0.9, kl=0.1), batch, current, formula)


def test_by_hand():
    """The KL penalties are 0.01, 0.02 | 0.03 | 0, 0.01, 0.02, and outcomes 1, 0 and 0.5."""
    batch = tc.Rollouts(
        torch.arange(6),
        torch.tensor([0, 2, 3, 6]),
        torch.zeros(3, dtype=torch.long),
        torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64),
        old_log_probs=torch.tensor([0.1, 0.2, 0.3, 0.0, 0.1, 0.2], dtype=torch.float64) - 1,
        ref_log_probs=-torch.ones(6, dtype=torch.float64),
    )
    advantages = tc.methods.reinforce_pp(kl=0.1).prepare(batch).advantages.tolist()
    expected = [1.09292889, 1.11937072, -1.55125391, -0.22916251, -0.22916251, -0.20272068]
    assert advantages == pytest.approx(expected, rel=1e-7)


def test_tokens_of_tools_neither_decay_nor_count():
    """A KL of 1 at every token; verl and slime counted those of masked tokens, or ended the return there."""
    batch = tc.Rollouts(
        torch.arange(4),
        torch.tensor([0, 4]),
        torch.tensor([0]),
        torch.tensor([0.0]),
        torch.tensor([True, False, False, True]),
        old_log_probs=torch.ones(4),
        ref_log_probs=torch.zeros(4),
    )
    assert tc.credit.returns(0.9, kl=1.0)(batch).tolist() == pytest.approx([-1.9, 0, 0, -1])


def test_defaults():
    assert tc.methods.reinforce_pp() == tc.Objective(
        tc.credit.whitened(tc.credit.returns(1.0, kl=0.01)),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.token_mean(),
    )
