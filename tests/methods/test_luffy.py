import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.luffy import ratio_of_samples, sampled_baseline, shaped


@pytest.mark.parametrize("scale", [False, True])
def test_formula(scale):
    def formula(batch, log_probs):
        expert, rewards = batch.input("expert").tolist(), batch.rewards.tolist()
        losses = []
        for rows in naive.counted_rows(batch):
            own = [rewards[r] for r in rows if not expert[r]]
            mean = sum(own) / len(own)
            std = math.sqrt(sum((x - mean) ** 2 for x in own) / (len(own) - 1)) if scale and len(own) > 1 else 1.0
            for r in rows:
                advantage = (rewards[r] - mean) / (std or 1.0)
                for t in naive.rows_of(batch)[r]:
                    if expert[r]:
                        p = log_probs[t].exp()
                        slope = (0.2 * p / (p + 0.2) ** 2).item()
                        losses.append(-advantage * slope * log_probs[t])
                    else:
                        q = (log_probs[t] - batch.old_log_probs[t]).exp().item()
                        losses.append(-advantage * q * log_probs[t])
        return sum(losses) / 11 / 7

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"expert"})
    # No old policy made the expert's rows.
    old = batch.shaped(batch.old_log_probs).masked_fill(batch.input("expert")[:, None], 0.0)
    naive.check(tc.methods.luffy(0.2, scale, 7), batch.with_inputs(old_log_probs=old), current, formula)


def test_by_hand():
    batch, current = naive.two_rows(expert=torch.tensor([True, True]))
    found = naive.slopes(tc.methods.luffy(), batch, current)
    expected = [-0.130178, -0.204082, -0.109375, -0.222222, 0.1875, 0.082645, 0.084724]
    assert found == pytest.approx(expected, abs=1e-6)
    batch, current = naive.two_rows(expert=torch.tensor([False, True]))
    found = naive.slopes(tc.methods.luffy(), batch, current)
    assert found == pytest.approx([-1.1, -5, -0.777778, -1, *expected[4:]], abs=1e-6)


def test_baseline():
    tokens = torch.zeros(5, 1, dtype=torch.long)
    batch = tc.Rollouts.from_padded(
        tokens,
        tokens == 0,
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5]),
        extras={"expert": torch.tensor([False, False, True, True, True])},
    )
    # Group 1 has no row of the policy: mean 0.
    assert sampled_baseline()(batch)[:, 0].tolist() == [0.5, -0.5, 0.5, 1.0, 0.5]
    std = math.sqrt(0.5)
    assert sampled_baseline(scale=True)(batch)[:, 0].tolist() == pytest.approx(
        [0.5 / std, -0.5 / std, 0.5 / std, 1, 0.5]
    )


def test_defaults():
    assert tc.methods.luffy() == tc.Objective(
        sampled_baseline(False),
        clip=ratio_of_samples(),
        scales=(shaped(0.1),),
        aggregation=tc.aggregation.sequence_sum(None),
    )
