import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.supervised import nll


@pytest.mark.parametrize("seed", range(2))
def test_formula(seed):
    batch, current = naive.random_batch(seed)

    def formula(batch, log_probs):
        return naive.token_mean(batch, [[-log_probs[t] for t in tokens] for tokens in naive.rows_of(batch)])

    naive.check(tc.methods.meet(), batch, current, formula)


def test_by_hand():
    log_probs = torch.tensor([-0.2, -1.0, -0.5, -0.4, -2.0], dtype=torch.float64, requires_grad=True)
    batch = tc.Rollouts(
        torch.arange(5), torch.tensor([0, 3, 5]), torch.zeros(2, dtype=torch.long), torch.tensor([1.0, 0])
    )
    objective = tc.methods.meet()
    out = objective.loss(objective.prepare(batch), log_probs)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.82)
    assert log_probs.grad.tolist() == pytest.approx([-0.2] * 5)


def test_defaults():
    assert tc.methods.meet() == tc.Supervised(nll(), aggregation=tc.aggregation.token_mean()) == tc.methods.sft()
