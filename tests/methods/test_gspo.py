import naive
import pytest
import tokcredit as tc


@pytest.mark.parametrize("seed", range(3))
def test_formula(seed):
    """The sequence form: one ratio per row with the gradient through all of its tokens."""

    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch)
        losses = []
        for r, tokens in enumerate(naive.rows_of(batch)):
            if tokens:
                ratio = sum(log_probs[t] - batch.old_log_probs[t] for t in tokens) / len(tokens)
                losses.append([naive.clipped(advantages[r], ratio.exp(), 0.9, 1.1)])
        return naive.sequence_mean(batch, losses)

    naive.check(tc.methods.gspo(0.1, 0.1), *naive.random_batch(seed), formula)


def test_by_hand():
    # Log-ratios 0.2 and 0 average to 0.1, whatever each token's own ratio.
    import torch

    batch = tc.Rollouts(
        torch.arange(3),
        torch.tensor([0, 2, 3]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.0]),
        old_log_probs=torch.tensor([-0.2, 0.0, 0.0]),
    )
    objective = tc.methods.gspo(1.0, 1.0)
    out = objective.loss(objective.prepare(batch), torch.zeros(3))
    assert out.loss.item() == pytest.approx(0.5 * (-1.1051709 + 1.0) * 0.7071057, abs=1e-5)
