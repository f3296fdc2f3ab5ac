import naive
import pytest
import tokcredit as tc
import torch


def test_formula():
    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch)
        rows = []
        for r, tokens in enumerate(naive.rows_of(batch)):
            if tokens:
                x = sum(log_probs[t] - batch.old_log_probs[t] for t in tokens) / len(tokens)
                rows.append(len(tokens) * naive.clipped(advantages[r], x.exp(), 0.9, 1.1))
        return sum(rows) / len(rows)

    naive.check(tc.methods.luspo(0.1, 0.1), *naive.random_batch(), formula)


def test_by_hand():
    batch, current = naive.two_rows()
    objective = tc.methods.luspo(0.9, 1.0)
    assert naive.slopes(objective) == pytest.approx([-1.438151] * 4 + [0.505712] * 3, abs=1e-6)
    plain = tc.Objective(naive.fixed(), ratio=objective.ratio, clip=objective.clip, aggregation=objective.aggregation)
    loss = plain.loss(plain.prepare(batch), current).loss
    torch.testing.assert_close(loss, torch.tensor(-2.117733, dtype=torch.float64), rtol=0, atol=2e-6)


def test_defaults():
    assert tc.methods.luspo() == tc.Objective(
        ratio=tc.ratio.sequence(),
        clip=tc.clip.ppo(0.002, 0.0025, None),
        aggregation=tc.aggregation.sequence_sum(1),
    )
