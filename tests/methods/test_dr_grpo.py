import naive
import pytest
import tokcredit as tc


@pytest.mark.parametrize("max_length", [None, 50])
def test_formula(max_length):
    def formula(batch, log_probs):
        losses = naive.ppo(batch, log_probs, naive.group_advantages(batch, scale=False), 0.8, 1.2)
        rows = [sum(row) for row in losses if row]
        return sum(rows) / len(rows) / (max_length or 7)

    naive.check(tc.methods.dr_grpo(max_length=max_length), *naive.random_batch(), formula)


def test_by_hand():
    batch, _ = naive.random_batch(groups=1)
    advantages = tc.methods.dr_grpo().prepare(batch).credit[:, 0]
    counted = batch.lengths > 0
    assert not counted.all()
    mean = batch.rewards[counted].mean()
    assert advantages[counted].tolist() == pytest.approx((batch.rewards[counted] - mean).tolist())


def test_defaults():
    assert tc.methods.dr_grpo() == tc.Objective(
        credit=tc.credit.group_normalized(scale=False, epsilon=1e-6), aggregation=tc.aggregation.sequence_sum(None)
    )
