import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.lenvm import length_advantage


@pytest.mark.parametrize("trace", [1.0, 0.5])
@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_formula(trace, scale):
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"length_values", "truncated"})
    gamma = 0.9

    def formula(batch, log_probs):
        value, losses = batch.extras["length_values"].tolist(), []
        cut = batch.extras["truncated"].tolist()
        for a, tokens, c in zip(naive.group_advantages(batch), naive.rows_of(batch), cut, strict=True):
            row, later, after = [], 0.0, 0.0
            if c and tokens:
                # One token less to go than before the last one.
                togo = math.log(1 + value[tokens[-1]]) / math.log(gamma)
                after = -(1 - gamma ** max(togo - 1, 0))
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
        extras={
            "length_values": torch.tensor([-0.5, -0.5, -0.75]),
            "truncated": torch.tensor([False, False]),
        },
    )
    prepared = tc.methods.lenvm(scale=2.0, gamma=0.5).prepare(batch)
    assert prepared.advantages.tolist() == pytest.approx([-0.5, 0.0, 0.5])
    assert prepared.has_gradient.tolist() == [True, True]


def test_a_cut_row_is_no_short_row():
    # Predicted 2 tokens to go before either token: the first is a surprise of one token more, the second none.
    batch = tc.Rollouts(
        torch.arange(2),
        torch.tensor([0, 2]),
        torch.tensor([0]),
        torch.tensor([0.0]),
        extras={"length_values": torch.tensor([-0.75, -0.75]), "truncated": torch.tensor([True])},
    )
    objective = tc.methods.lenvm(scale=1.0, gamma=0.5)
    assert objective.prepare(batch).advantages.tolist() == pytest.approx([-0.125, 0.0])
    batch.extras["truncated"][0] = False
    # Ended there, the first was no surprise and the second ended the row a token early.
    assert objective.prepare(batch).advantages.tolist() == pytest.approx([0.0, 0.25])


def test_defaults():
    assert tc.methods.lenvm() == tc.Objective(
        credit=length_advantage(
            tc.credit.group_normalized(scale=True, epsilon=1e-6, count_empty=False), scale=0.1, gamma=0.997, trace=1.0
        )
    )
