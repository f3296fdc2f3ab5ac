import dataclasses

import naive
import pytest
import tokcredit as tc
import torch


def test_formula():
    """With another advantage at each token; the gradient of the row's ratio reaches its own token alone."""
    batch, current = naive.random_batch()
    batch = batch.with_inputs(turn_rewards=torch.randn(batch.num_tokens, dtype=torch.float64))

    def formula(batch, log_probs):
        advantages, losses = batch.input("turn_rewards"), []
        for tokens in naive.rows_of(batch):
            x = [(log_probs[t] - batch.old_log_probs[t]).detach() for t in tokens]
            mean = (sum(x) / len(x)).exp() if x else None
            q = [mean * (log_probs[t] - log_probs[t].detach()).exp() for t in tokens]
            losses.append([naive.clipped(advantages[t].item(), y, 0.9, 1.2) for t, y in zip(tokens, q, strict=True)])
        return naive.sequence_mean(batch, losses)

    objective = dataclasses.replace(tc.methods.gspo_token(0.1, 0.2), credit=naive.fixed(tokens=True))
    naive.check(objective, batch, current, formula)


def test_by_hand():
    # The rows' ratios are 1.438151 and 0.505712, outside of [0.9, 1.2] on the side where A > 0 and A < 0 stop.
    given = torch.tensor([[2, -1, 0.5, 0, 0], [-1, 0, 1, -0.5, 0]], dtype=torch.float64)
    batch, current = naive.two_rows(turn_rewards=given)
    found = naive.slopes(tc.methods.gspo_token(0.1, 0.2), batch, current, naive.fixed(tokens=True))
    assert found == pytest.approx([0, 1.438151, 0, 0, 0, -0.505712, 0], abs=1e-6)


def test_defaults():
    assert (
        tc.methods.gspo_token()
        == tc.methods.gspo()
        == tc.Objective(
            ratio=tc.ratio.sequence(), clip=tc.clip.ppo(3e-4, 4e-4), aggregation=tc.aggregation.sequence_mean()
        )
    )
