import math
import statistics

import naive
import pytest
import tokcredit as tc
import torch


def batch_of(rewards, groups, lengths=None, dtype=torch.float32, **named):
    lengths = lengths or [1] * len(rewards)
    return tc.Rollouts(
        torch.arange(sum(lengths)),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor(groups),
        torch.tensor(rewards, dtype=dtype),
        **named,
    )


def test_group_normalized_against_the_statistics_module():
    batch, _ = naive.random_batch()
    ours = tc.credit.group_normalized()(batch)[:, 0]
    for rows in naive.counted_rows(batch):
        own = [batch.rewards[r].item() for r in rows]
        for r in rows:
            expected = (batch.rewards[r].item() - statistics.fmean(own)) / (statistics.stdev(own) + 1e-6)
            assert ours[r].item() == pytest.approx(expected, rel=1e-12)


def test_leave_one_out_by_hand():
    batch = batch_of([1.0, 0.0, 0.5, 4.0], [0, 0, 0, 1])
    assert tc.credit.leave_one_out()(batch)[:, 0].tolist() == pytest.approx([0.75, -0.75, 0.0, 0.0])


@pytest.mark.parametrize("credit", [tc.credit.group_normalized, tc.credit.leave_one_out])
def test_rows_without_a_token_that_the_policy_chose_do_not_count(credit):
    """``count_empty`` counts them, as TRL and verl do."""
    mask = torch.tensor([True, True, False])
    batch = batch_of([1.0, 0.0, 0.0], [0, 0, 0], response_mask=mask)
    two = batch_of([1.0, 0.0], [0, 0])
    three = batch_of([1.0, 0.0, 0.0], [0, 0, 0])
    torch.testing.assert_close(credit()(batch)[:2], credit()(two), rtol=0, atol=0)
    torch.testing.assert_close(credit(count_empty=True)(batch), credit()(three), rtol=0, atol=0)
    assert credit()(two)[1] != credit()(three)[1]


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "tempo"])
@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_rewards_of_any_size_have_the_advantages_of_rewards_of_size_one(method, size):
    """``3e38 - -3e38`` overflows float32, and so does the square of 1e30.

    Statistics are float64. An advantage that exceeds float32 is inf (rloo's ``3e38 - -3e38``), as its formula says.
    """
    pattern, groups = [1.0, -1.0, 0.5, 1.0], [0, 0, 1, 1]
    scaled = method in ("grpo", "tempo")
    objective = tc.methods.load(method, **({"epsilon": 0.0} if scaled else {}))
    ours = objective.prepare(batch_of([size * x for x in pattern], groups)).advantages
    expected = objective.prepare(batch_of(pattern, groups, dtype=torch.float64)).advantages
    expected = (expected if scaled else expected * size).float()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert (ours != 0).all()


def test_equal_rewards_have_advantages_of_exactly_zero():
    for value in (0.1, 1 / 3, 1e30, 1e-30):
        batch = batch_of([value] * 7, [0] * 7)
        for credit in (
            tc.credit.group_normalized(),
            tc.credit.leave_one_out(),
            tc.credit.group_normalized(scale=False),
        ):
            assert not credit(batch).any()
        assert not tc.methods.tempo().prepare(batch).advantages.any()


def test_float64_rewards_stay_float64():
    batch = batch_of([1.0, 1.0 + 1e-12, 0.0], [0, 0, 1], dtype=torch.float64)
    ours = tc.credit.group_normalized(scale=False)(batch)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours[:2, 0], torch.tensor([-5e-13, 5e-13], dtype=torch.float64), rtol=1e-3, atol=0)


def test_half_precision_rewards_are_computed_in_float32():
    batch = batch_of([1.0, 0.0], [0, 0], dtype=torch.bfloat16)
    assert tc.credit.group_normalized()(batch).dtype == batch.rewards.dtype == torch.float32


def test_constants_and_thresholds():
    batch = batch_of([0.2, 0.5, 0.7], [0, 0, 0])
    assert tc.credit.constant(2)(batch).tolist() == [[2.0]] * 3
    assert tc.credit.thresholded(3.0, -1.0)(batch)[:, 0].tolist() == [-1.0, -1.0, 3.0]
    centred = tc.credit.group_normalized(scale=False)
    assert tc.credit.negative_part(centred)(batch)[:, 0].tolist() == pytest.approx([0.2 - 1.4 / 3, 0, 0])


def test_sum_of_credit_per_row_and_per_token():
    batch, _ = naive.random_batch()
    a, b = tc.credit.group_normalized(), tc.methods.tempo().credit
    both = tc.credit.sum(a, b, 0.25)(batch)
    expected = torch.where(batch.response_mask, a(batch).expand(12, 7).reshape(-1) + 0.25 * b(batch), 0)
    torch.testing.assert_close(both[batch.response_mask], expected[batch.response_mask])
    rows = tc.credit.sum(a, tc.credit.constant(2.0), -1.0)(batch)
    torch.testing.assert_close(rows, a(batch) - 2)


@pytest.mark.parametrize("nonzero", [False, True])
@pytest.mark.parametrize("below", [None, 0.6])
def test_whitened(nonzero, below):
    batch, _ = naive.random_batch()
    of = tc.credit.group_normalized(scale=False)
    ours = tc.credit.whitened(of, below, nonzero)(batch)
    row = {t: of(batch)[r, 0].item() for r, tokens in enumerate(naive.rows_of(batch)) for t in tokens}
    inside = [t for t in row if not nonzero or row[t] != 0]
    counted = [t for t in inside if below is None or batch.old_log_probs[t] < math.log(below)]
    mean, var = statistics.fmean(row[t] for t in counted), statistics.variance([row[t] for t in counted])
    for t in range(84):
        expected = (row[t] - mean) / math.sqrt(var + 1e-8) if t in inside else 0.0
        assert ours[t].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("reward", [0.1, 2.1, -0.7])
@pytest.mark.parametrize("below", [None, 0.6])
def test_equal_advantages_whitened_are_0(reward, below):
    for length in range(1, 20):
        old = torch.full((length,), -0.7)
        batch = batch_of([reward], [0], [length], dtype=torch.float64, old_log_probs=old)
        assert tc.credit.whitened(tc.credit.returns(), below)(batch).tolist() == [0] * length


@pytest.mark.parametrize("scale", [False, True])
def test_a_group_of_one(scale):
    """Its reward, or 0. A row without a token that the policy chose does not make a second."""
    batch = batch_of([2.0, 3.0, 1.0, 5.0], [0, 1, 1, 0], response_mask=torch.tensor([True, True, True, False]))
    raw, zero = (tc.credit.group_normalized(scale, 0.0, alone=alone)(batch)[:3, 0] for alone in ("raw", "zero"))
    assert raw[0] == 2 and zero[0] == 0
    assert torch.equal(raw[1:], zero[1:]) and raw[1] == -raw[2] > 0
    counted = tc.credit.group_normalized(scale, 0.0, count_empty=True, alone="zero")(batch)
    assert counted[0, 0] < 0


def test_value_changes_by_hand():
    """Values before tokens 1 and 3 of a row with reward 1; the first token comes before any value."""
    values = torch.tensor([math.nan, 0.25, math.nan, 0.75, math.nan])
    batch = batch_of([1.0], [0], [5], extras={"state_values": values})
    assert tc.credit.value_changes()(batch).tolist() == [0.0, 0.5, 0.5, 0.25, 0.25]


def test_improbable_cuts():
    old = torch.tensor([0.5, 0.95, 0.5, 0.5, 0.99, 0.5, 0.5, 0.5]).log()
    batch = batch_of([1.0, 0.0], [0, 0], [6, 2], old_log_probs=old)
    cuts = tc.credit.improbable_cuts(batch, 0.9, interval=2)
    assert cuts.nonzero()[:, 0].tolist() == [0, 3, 6]
    with pytest.raises(ValueError, match="interval: expected at least 1, got 0"):
        tc.credit.improbable_cuts(batch, interval=0)
