import math

import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("low", [0.3, 10.0])
def test_formula(low):
    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch)
        losses = []
        for r, tokens in enumerate(naive.rows_of(batch)):
            weight = [(log_probs[t] - batch.old_log_probs[t]).exp().clamp(1 - low, 1.2).detach() for t in tokens]
            losses.append([-w * advantages[r] * log_probs[t] for w, t in zip(weight, tokens, strict=True)])
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.cispo(clip_low=low), *naive.random_batch(), formula)


def test_by_hand():
    # Ratio 1.5 with A > 0 is weighed 1.2 and still learns; PPO would stop it.
    batch = tc.Rollouts(
        torch.arange(2),
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.0]),
        old_log_probs=torch.tensor([-1.5, -1.0]),
    )
    log_probs = torch.tensor([-1.5, -1.0]).add(torch.tensor([1.5, 1.0]).log()).requires_grad_()
    objective = tc.methods.cispo()
    objective.loss(objective.prepare(batch), log_probs).loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-1.2 * 0.70711 / 2, 0.70711 / 2], abs=1e-5)


def test_defaults():
    assert tc.methods.cispo() == tc.Objective(
        clip=tc.clip.gated(
            on="ratio",
            low=-math.inf,
            high=math.log(1 + 0.2),
            outside_low=1.0,
            outside_high=1.0,
            cap=None,
            both_sides=True,
        ),
        aggregation=tc.aggregation.token_mean(),
    )
