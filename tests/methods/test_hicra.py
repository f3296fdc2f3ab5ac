import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.hicra import favoured


def test_formula():
    def formula(batch, log_probs):
        planning, advantages = batch.input("planning_tokens").tolist(), naive.group_advantages(batch)
        losses = []
        for r, tokens in enumerate(naive.rows_of(batch)):
            own = [advantages[r] + 0.3 * abs(advantages[r]) * planning[t] for t in tokens]
            q = [(log_probs[t] - batch.old_log_probs[t]).exp() for t in tokens]
            losses.append([naive.clipped(a, y, 0.8, 1.2) for a, y in zip(own, q, strict=True)])
        return naive.sequence_mean(batch, losses)

    batch, current = naive.random_batch()
    naive.check(tc.methods.hicra(0.3), naive.with_inputs(batch, {"planning_tokens"}), current, formula)


def test_by_hand():
    tokens = torch.arange(4).view(2, 2)
    batch = tc.Rollouts.from_padded(
        tokens,
        tokens >= 0,
        torch.zeros(2, dtype=torch.long),
        torch.tensor([1.0, 0.0]),
        extras={"planning_tokens": torch.tensor([[True, False], [True, False]])},
    )
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert (favoured()(batch, advantages) * advantages).tolist() == pytest.approx([1.2, 1, -0.8, -1])


def test_defaults():
    assert tc.methods.hicra() == tc.Objective(token_weights=(favoured(0.2),), clip=tc.clip.ppo(0.2, 0.2))
