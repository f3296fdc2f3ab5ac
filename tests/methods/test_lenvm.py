import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("trace", [1.0, 0.5])
@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_formula(trace, scale):
    batch, current = naive.random_batch()
    batch = naive.with_evidence(batch, {"length_values"})
    gamma = 0.9

    def formula(batch, log_probs):
        value, losses = batch.extras["length_values"].tolist(), []
        for a, tokens in zip(naive.group_advantages(batch), naive.rows_of(batch), strict=True):
            row, later, after = [], 0.0, 0.0
            for t in reversed(tokens):
                later = -(1 - gamma) + gamma * after - value[t] + gamma * trace * later
                after = value[t]
                ratio = (log_probs[t] - batch.old_log_probs[t]).exp()
                row.append(naive.clipped(a + scale * later, ratio, 0.8, 1.2))
            losses.append(row)
        return naive.sequence_mean(batch, losses)

    naive.check(tc.methods.lenvm(scale, gamma, trace), batch, current, formula)


def test_by_hand():
    # Two tokens with gamma 0.5: the values to come are -0.75 and -0.5. Predicted -0.5 and -0.5: the first token is
    # a surprise of -0.25, the second none.
    batch = tc.Rollouts(
        torch.arange(3),
        torch.tensor([0, 2, 3]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 1.0]),
        extras={"length_values": torch.tensor([-0.5, -0.5, -0.75])},
    )
    prepared = tc.methods.lenvm(scale=2.0, gamma=0.5).prepare(batch)
    assert prepared.advantages.tolist() == pytest.approx([-0.5, 0.0, 0.5])
    assert prepared.has_credit.tolist() == [True, True]
