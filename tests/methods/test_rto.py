import math

import naive
import pytest
import tokcredit as tc
import torch
from test_ppo import estimates
from tokcredit.methods.rto import aligned_rewards


@pytest.mark.parametrize("dense", [False, True])
def test_formula(dense):
    def formula(batch, log_probs):
        aligned, ref = batch.input("aligned_log_probs"), batch.ref_log_probs
        given = batch.token_rewards.tolist() if dense else [0.0] * batch.num_tokens
        values, advantages = batch.extras["values"].tolist(), {}
        for r, row in enumerate(naive.rows_of(batch)):
            own = []
            for t in row:
                shaped = max(min(0.2 * (aligned[t] - ref[t]).item(), 0.06), -0.06)
                own.append(shaped + given[t] - 0.1 * (batch.old_log_probs[t] - ref[t]).item())
            if own:
                own[-1] += max(min(batch.rewards[r].item(), 0.9), -0.9)
            advantages |= dict(zip(row, estimates(own, [values[t] for t in row], 1.0, 0.8), strict=True))
        token_losses = naive.token_ppo(batch, log_probs, naive.whitened(advantages), 0.8, 1.2)
        return naive.sequence_mean(batch, token_losses)

    batch, current = naive.random_batch()
    names = {"values", "aligned_log_probs", "ref_log_probs"} | ({"token_rewards"} if dense else set())
    batch = naive.with_inputs(batch, names)
    naive.check(tc.methods.rto(0.2, 0.06, 0.1, 0.8, 0.9), batch, current, formula)


def one_row(reward=1.7):
    return tc.Rollouts(
        torch.arange(3),
        torch.tensor([0, 3]),
        torch.tensor([0]),
        torch.tensor([reward], dtype=torch.float64),
        old_log_probs=torch.tensor([-0.5, -1, -0.2], dtype=torch.float64),
        ref_log_probs=torch.tensor([-0.6, -0.7, -0.3], dtype=torch.float64),
        extras={
            "aligned_log_probs": torch.tensor([-0.4, -2.5, -0.1], dtype=torch.float64),
            "values": torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64),
        },
    )


def test_by_hand():
    batch = one_row()
    credit = tc.methods.rto().credit.of
    assert credit(batch).tolist() == pytest.approx([1.3407225, 1.29655, 1.309])
    plain = tc.mix("rto", credit=credit)
    new = torch.tensor([-0.3, -1.05, -0.2], dtype=torch.float64)
    assert plain.loss(plain.prepare(batch), new).loss.item() == pytest.approx(-1.3837278368, abs=1e-9)
    whitened = tc.methods.rto().prepare(batch).advantages * 1.5**0.5  # of the sample in place of the population
    assert whitened.tolist() == pytest.approx([1.360368114, -1.014921187, -0.345446926], abs=1e-3)
    assert credit(one_row(50.0))[2] - credit(one_row(10.0))[2] == 0


def test_half_precision_keeps_the_bound_of_the_outcome():
    batch = one_row(12.3125)
    half = {name: batch.input(name).bfloat16() for name in ("old_log_probs", "ref_log_probs", "aligned_log_probs")}
    exact, rounded = batch.with_inputs(**{name: x.double() for name, x in half.items()}), batch.with_inputs(**half)
    credit = tc.methods.rto().credit.of
    torch.testing.assert_close(credit(rounded), credit(exact), rtol=1e-12, atol=0)


def test_a_missing_log_prob_is_an_error():
    batch = one_row().with_inputs(aligned_log_probs=torch.tensor([-0.4, math.nan, -0.1]))
    with pytest.raises(ValueError, match="aligned_log_probs, ref_log_probs: expected numbers"):
        tc.methods.rto().prepare(batch)


def test_what_the_critic_learns_by_hand():
    """Rewards 0.009, -0.047 and 1.709, summed from the end, whatever the values are and however the row is cut."""
    batch, credit = one_row(), tc.methods.rto().credit
    expected = pytest.approx([1.671, 1.662, 1.709])
    assert credit.targets(batch).tolist() == expected
    assert credit.targets(batch.with_inputs(values=batch.extras["values"] + 3)).tolist() == expected
    two = tc.Rollouts(
        batch.tokens,
        torch.tensor([0, 2, 3]),
        torch.zeros(2, dtype=torch.long),
        batch.rewards.expand(2).clone(),
        old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.ref_log_probs,
        trajectory_ids=torch.zeros(2, dtype=torch.long),
        extras=batch.extras,
    )
    assert credit.targets(two).tolist() == expected


def test_without_the_aligned_policy_it_is_ppo():
    batch = one_row()
    ours, ppo = tc.methods.rto(scale=0.0), tc.mix("ppo(kl=0.01)", aggregation="sequence_mean")
    torch.testing.assert_close(ours.prepare(batch).advantages, ppo.prepare(batch).advantages)


def test_defaults():
    assert tc.methods.rto() == tc.Objective(
        tc.credit.whitened(aligned_rewards(tc.credit.gae(1.0, 0.95, kl=0.01), 0.05, 0.05, 10.0)),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.sequence_mean(),
    )
