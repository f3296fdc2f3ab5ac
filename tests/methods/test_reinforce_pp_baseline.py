import dataclasses

import naive
import pytest
import tokcredit as tc
import torch


def test_formula():
    def formula(batch, log_probs):
        of_rows = naive.group_advantages(batch, scale=False)
        tokens = naive.rows_of(batch)
        advantages = naive.whitened({t: of_rows[r] for r, row in enumerate(tokens) for t in row})
        penalty = [[(log_probs[t] - batch.ref_log_probs[t]) ** 2 / 2 for t in row] for row in tokens]
        losses = naive.token_ppo(batch, log_probs, advantages, 0.8, 1.2)
        return naive.token_mean(batch, losses) + 0.3 * naive.token_mean(batch, penalty)

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    naive.check(tc.methods.reinforce_pp_baseline(kl=0.3), batch, current, formula)


def test_by_hand():
    """A long response weighs more in the mean and the variance of the batch."""
    batch = tc.Rollouts(
        torch.arange(6),
        torch.tensor([0, 2, 3, 6]),
        torch.zeros(3, dtype=torch.long),
        torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64),
        ref_log_probs=torch.zeros(6),
    )
    advantages = tc.methods.reinforce_pp_baseline().prepare(batch).advantages.tolist()
    assert advantages == pytest.approx([1.10701857] * 2 + [-1.54982599] + [-0.22140371] * 3, rel=1e-7)


def test_credits_that_the_docstring_names():
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    of_trajectories = tc.mix("reinforce_pp_baseline", credit="batch_normalized(group_normalized(scale=False))")
    found = of_trajectories.prepare(batch).credit[batch.nonempty, 0]
    assert found.mean().item() == pytest.approx(0, abs=1e-6) and found.std().item() == pytest.approx(1, rel=1e-3)
    alone = dataclasses.replace(batch, group_ids=torch.arange(batch.num_rows))
    without = tc.mix("reinforce_pp_baseline", credit="whitened(group_normalized(scale=False, alone=zero))")
    assert not without.prepare(alone).advantages.any()


def test_defaults():
    assert tc.methods.reinforce_pp_baseline() == tc.Objective(
        tc.credit.whitened(tc.credit.group_normalized(scale=False)),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.token_mean(),
        terms=(tc.term.kl(0.01, "k2"),),
    )
