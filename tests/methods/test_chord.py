import dataclasses

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.chord import expert_nll, remainder, sampled


@pytest.mark.parametrize("uncertain", [False, True])
def test_formula(uncertain):
    def formula(batch, log_probs):
        expert = batch.input("expert").tolist()
        rows = naive.rows_of(batch)
        own = batch.keeping(~batch.input("expert"))
        kept = iter(naive.group_advantages(own))
        advantages = [0.0 if expert[r] else next(kept) for r in range(len(rows))]
        losses = naive.ppo(batch, log_probs, advantages, 0.8, 1.2)
        policy = [x for r, row in enumerate(losses) if not expert[r] for x in row]
        imitation = []
        for r, row in enumerate(rows):
            if expert[r]:
                p = [log_probs[t].exp().item() for t in row]
                weight = [x * (1 - x) if uncertain else 1.0 for x in p]
                imitation += [-w * log_probs[t] for w, t in zip(weight, row, strict=True)]
        return 0.7 * sum(policy) / len(policy) + 0.3 * sum(imitation) / len(imitation)

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"expert"})
    naive.check(tc.methods.chord(0.3, uncertain), batch, current, formula)


def test_by_hand():
    batch, current = naive.two_rows(expert=torch.tensor([True, True]))
    variable = current.clone().requires_grad_()
    objective = dataclasses.replace(tc.methods.chord(1.0), aggregation=tc.aggregation.token_sum())
    prepared = objective.prepare(batch)
    objective.loss(prepared, variable).loss.backward()
    found = variable.grad[batch.shaped(batch.response_mask)]
    expected = [-0.2475, -0.1875, -0.21, -0.16, -0.21, -0.0099, -0.0291]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    # Rows of the expert need a backward pass although the filter takes them out of the policy loss.
    assert prepared.has_gradient.all() and not prepared.mask.any()


def test_the_share_may_be_a_schedule():
    objective = tc.methods.chord(tc.schedule.linear(0.9, 0.1))
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"expert"})
    scheduled = objective.loss(objective.prepare(batch, progress=0.5), current).loss
    fixed = tc.methods.chord(0.5)
    torch.testing.assert_close(scheduled, fixed.loss(fixed.prepare(batch), current).loss)


def test_defaults():
    assert tc.methods.chord() == tc.Objective(
        filters=(sampled(),),
        token_weights=(remainder(0.1),),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.token_mean(),
        terms=(expert_nll(0.1, True, tc.filters.marked("expert")),),
    )
