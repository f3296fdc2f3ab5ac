import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.stare import surprising


def test_formula():
    def formula(batch, log_probs):
        advantages, rows = naive.group_advantages(batch), naive.rows_of(batch)
        weight = {t: 1.0 for row in rows for t in row}
        for sign, factor in ((1, 1.3), (-1, 0.8)):
            own = [t for r, row in enumerate(rows) for t in row if sign * advantages[r] > 0]
            own.sort(key=lambda t: batch.old_log_probs[t].item())
            for t in own[: max(math.ceil(0.15 * len(own)), 1)]:
                weight[t] = factor
        losses = naive.ppo(batch, log_probs, advantages, 0.8, 1.28, 3.0)
        return naive.token_mean(
            batch, [[x * weight[t] for x, t in zip(*z, strict=True)] for z in zip(losses, rows, strict=True)]
        )

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"entropies"})
    naive.check(tc.methods.stare(0.15, 1.3, 0.8, target=5.0), batch, current, formula)


def hand(entropy):
    surprisal = torch.tensor([[0.1, 2.3, 0.7, 1.2, 0.05], [3.0, 0.2, 0.3, 0.4, 0.5]])
    tokens = torch.zeros(2, 5, dtype=torch.long)
    return tc.Rollouts.from_padded(
        tokens,
        tokens == 0,
        tokens[:, 0],
        torch.tensor([1.0, 0.0]),
        old_log_probs=-surprisal,
        entropies=torch.full((2, 5), entropy),
    )


def test_by_hand():
    advantages = torch.tensor([[1.0], [-1.0]])
    stage = surprising(0.4, positive=1.5, negative=0.5)
    assert stage(hand(0.2), advantages).tolist() == [1, 1.5, 1, 1.5, 1, 0.5, 1, 1, 1, 0.5]
    assert stage(hand(0.4), advantages).tolist() == [1] * 10
    # At least one token of each sign.
    assert stage(hand(0.2), torch.ones(2, 1)).sum().item() == pytest.approx(10 + 4 * 0.5)
    assert surprising(0.01, positive=2.0)(hand(0.2), advantages).tolist() == [1, 2, 1, 1, 1] + [1] * 5


def test_defaults():
    assert tc.methods.stare() == tc.Objective(
        token_weights=(surprising(0.1, 1.1, 1.0, 0.3),),
        clip=tc.clip.ppo(0.2, 0.28, 3.0),
        aggregation=tc.aggregation.token_mean(),
    )
