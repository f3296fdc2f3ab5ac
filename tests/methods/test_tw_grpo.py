import math

import naive
import pytest
import tokcredit as tc
import torch


def disagreement(logits, batch, padded):
    """Position by position and word by word; logits ``(B, T, V)``."""
    lp, mask = logits.double().log_softmax(-1), batch.response_mask.view(batch.shape)
    (_, width), vocabulary = batch.shape, logits.shape[-1]
    out = torch.zeros(batch.shape, dtype=torch.float64)
    for rows in naive.group_rows(batch):
        spread = {}
        for t in range(width):
            live = rows if padded else [r for r in rows if mask[r, t]]
            if not padded and len(live) < 2:
                continue
            uniform = torch.full((vocabulary,), -math.log(vocabulary), dtype=torch.float64)
            own = [lp[r, t] if mask[r, t] else uniform for r in live]
            mean = sum(own) / len(own)
            d = [(mean - x).clamp(-11, 11) for x in own]
            spread[t] = sum((x.exp() - x - 1).sum().item() for x in d) / len(own)
        low, high = min(spread.values(), default=0), max(spread.values(), default=0)
        for t, x in spread.items():
            for r in rows:
                out[r, t] = (x - low) / (high - low + 1e-8) if mask[r, t] else 0
    return out


def batch_with(logits, padded, **arguments):
    batch, current = naive.random_batch(**arguments)
    name = "padded_disagreement" if padded else "disagreement"
    batch.extras[name] = tc.divergence.disagreement(logits, batch, padded)
    return batch, current


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_formula(padded, seed):
    logits = 3 * torch.randn(12, 7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[0, 0] *= 30  # differences beyond 11 are cut
    batch, current = batch_with(logits, padded, seed=seed)

    def formula(batch, log_probs):
        w = (1 + 0.7 * disagreement(logits, batch, padded)).reshape(-1)
        losses = naive.ppo(batch, log_probs, naive.group_advantages(batch, epsilon=1e-4), 0.8, 1.28)
        return naive.token_mean(
            batch,
            [
                [w[t] * x for t, x in zip(ts, row, strict=True)]
                for ts, row in zip(naive.rows_of(batch), losses, strict=True)
            ],
        )

    naive.check(tc.methods.tw_grpo(padded=padded), batch, current, formula)


def test_by_hand():
    rows = [[(0.7, 0.2, 0.1), (0.5, 0.3, 0.2), (0.9, 0.05, 0.05)], [(0.6, 0.3, 0.1), (0.1, 0.3, 0.6), (0.2, 0.3, 0.5)]]
    logits = torch.tensor(rows, dtype=torch.float64).log()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rewards = torch.tensor([1.0, 0.0])
    batch = tc.Rollouts.from_padded(
        torch.zeros(2, 3, dtype=torch.long), mask, torch.zeros(2, dtype=torch.long), rewards
    )
    for padded, expected in ((True, [1, 1.308822, 1.7]), (False, [1, 1.7, 1])):
        name = "padded_disagreement" if padded else "disagreement"
        batch.extras[name] = tc.divergence.disagreement(logits, batch, padded)
        multiplier = tc.methods.tw_grpo(padded=padded).prepare(batch).multiplier
        assert multiplier[:3].tolist() == pytest.approx(expected, abs=1e-6)
        assert multiplier[3:5].tolist() == pytest.approx(expected[:2], abs=1e-6)


def test_needs_what_it_compares():
    batch, _ = naive.random_batch()
    with pytest.raises(
        ValueError, match="disagreement: expected in the batch because the objective reads it, got None"
    ):
        tc.methods.tw_grpo().prepare(batch)
    batch.extras["disagreement"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"disagreement: expected float \[84\], got float32 \[3\]"):
        tc.methods.tw_grpo().prepare(batch)


def test_defaults():
    assert tc.methods.tw_grpo() == tc.Objective(
        credit=tc.credit.group_normalized(epsilon=1e-4),
        token_weights=(tc.token_weights.raised(tc.token_score.given("disagreement"), strength=1.7 - 1),),
        clip=tc.clip.ppo(low=0.2, high=0.28, cap=None),
        aggregation=tc.aggregation.token_mean(),
    )
