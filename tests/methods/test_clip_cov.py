import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.clip_cov import dropped


def covariances(batch, advantages):
    tokens = [(r, t) for r, row in enumerate(naive.rows_of(batch)) for t in row]
    mean_advantage = sum(advantages[r] for r, _ in tokens) / len(tokens)
    mean = sum(batch.old_log_probs[t].item() for _, t in tokens) / len(tokens)
    return {t: (advantages[r] - mean_advantage) * (batch.old_log_probs[t].item() - mean) for r, t in tokens}


def test_formula():
    """With a share that takes all candidates, so that nothing is left to chance."""

    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch)
        cov = covariances(batch, advantages)
        assert 5 < sum(0.1 < c < 0.3 for c in cov.values()) < 30
        losses = naive.ppo(batch, log_probs, advantages, 0.9, 1.1)
        kept = [
            [x * (not 0.1 < cov[t] < 0.3) for x, t in zip(row, tokens, strict=True)]
            for row, tokens in zip(losses, naive.rows_of(batch), strict=True)
        ]
        return naive.token_mean(batch, kept)

    naive.check(tc.methods.clip_cov(0.1, 0.1, 1.0, 0.1, 0.3), *naive.random_batch(), formula)


def test_draws():
    batch, _ = naive.random_batch(groups=8, size=8)
    advantages = torch.tensor(naive.group_advantages(batch), dtype=torch.float64)[:, None]
    cov = covariances(batch, advantages[:, 0].tolist())
    candidates = {t for t, c in cov.items() if 0.1 < c < 0.6}
    stage = dropped(0.05, 0.1, 0.6)
    found = set((stage(batch, advantages) == 0).nonzero()[:, 0].tolist())
    assert len(found) == int(0.05 * len(cov)) and found < candidates
    # The same batch gives the same draw, another batch another one.
    assert torch.equal(stage(batch, advantages), stage(batch, advantages))
    for masked in (True, False):
        changed = batch.response_mask & (batch.response_mask.cumsum(0) == 1)
        if masked:
            changed = ~batch.response_mask
        moved = tc.Rollouts(
            torch.where(changed, batch.tokens + 1, batch.tokens),
            batch.spans,
            batch.group_ids,
            batch.rewards,
            batch.response_mask,
            old_log_probs=batch.old_log_probs,
        )
        assert torch.equal(stage(batch, advantages), stage(moved, advantages)) == masked


def test_by_hand():
    # Covariances .53 -1.44 1.04 -.25 and -.71 1.92 -1.38: two lie between 1 and 5.
    batch, _ = naive.two_rows()
    cov = tc.filters.covariance(batch, batch.rewards[:, None])[batch.response_mask]
    assert cov.tolist() == pytest.approx(
        [0.532150, -1.441495, 1.035967, -0.253243, -0.709533, 1.921993, -1.381289], abs=1e-6
    )
    all_of_them = dropped(1.0, 1.0, 5.0)(batch, batch.rewards[:, None])[batch.response_mask]
    assert all_of_them.tolist() == [1, 1, 0, 1, 1, 0, 1]
    one = dropped(1e-4, 1.0, 5.0)(batch, batch.rewards[:, None])[batch.response_mask]
    assert one.sum() == 6 and one[2] + one[5] == 1


def test_defaults():
    assert tc.methods.clip_cov() == tc.Objective(
        token_weights=(dropped(2e-4, 1.0, 5.0),),
        clip=tc.clip.ppo(0.2, 0.2, None),
        aggregation=tc.aggregation.token_mean(),
    )
