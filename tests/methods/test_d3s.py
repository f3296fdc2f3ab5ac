import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.d3s import varied_rows


def most_varied(values, count):
    """Indices of the subset of largest variance: the first i and the last count - i in descending order."""
    order = sorted(range(len(values)), key=lambda r: -values[r])
    subsets = [order[:i] + order[len(order) - (count - i) :] for i in range(count + 1)]

    def variance(rows):
        mean = sum(values[r] for r in rows) / count
        return sum((values[r] - mean) ** 2 for r in rows) / count

    return max(subsets, key=variance)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_formula(progress, seed):
    batch, current = naive.random_batch(seed)
    batch = naive.with_inputs(batch, {"entropies"})

    def formula(batch, log_probs):
        advantages, tokens = naive.group_advantages(batch), naive.rows_of(batch)
        live = [r for r in range(batch.num_rows) if tokens[r]]
        count = round(((1 - progress) * 0.25 + progress * 1.0) * len(live))
        rows = sorted(live[i] for i in most_varied([advantages[r] for r in live], count))
        rows = [r for r in rows if advantages[r] != 0]
        scores = [(abs(advantages[r]) * batch.entropies[t].item(), t) for r in rows for t in tokens[r]]
        share = (1 - progress) * 0.2 + progress * 1.0
        chosen = {t for _, t in sorted(scores, key=lambda x: (-x[0], x[1]))[: math.ceil(share * len(scores) - 1e-9)]}
        losses = naive.ppo(batch, log_probs, advantages, 0.8, 1.2)
        kept = [x for row, ts in zip(losses, tokens, strict=True) for x, t in zip(row, ts, strict=True) if t in chosen]
        return sum(kept) / len(chosen)

    naive.check(tc.methods.d3s(), batch, current, formula, progress)


def test_by_hand():
    # Advantages of four rows of two tokens in one group, half of the rows: the extremes. Then half of their tokens.
    batch = tc.Rollouts(
        torch.arange(8),
        torch.tensor([0, 2, 4, 6, 8]),
        torch.zeros(4, dtype=torch.long),
        torch.tensor([1.0, 0.6, 0.4, 0.0]),
        entropies=torch.tensor([0.1, 0.9, 2.0, 2.0, 2.0, 2.0, 0.5, 0.2]),
    )
    objective = tc.methods.d3s(rows_start=0.5, tokens_start=0.5)
    prepared = objective.prepare(batch, progress=0.0)
    assert prepared.mask.nonzero()[:, 0].tolist() == [1, 6]
    everything = objective.prepare(batch, progress=1.0)
    assert everything.mask.all()
    assert prepared.row_weights == 0.5 and everything.row_weights == 0.125


def test_progress_is_asked_for_and_checked():
    batch = naive.with_inputs(naive.random_batch()[0], {"entropies"})
    with pytest.raises(ValueError, match="progress: expected a number from 0 to 1 because of linear"):
        tc.methods.d3s().prepare(batch)
    with pytest.raises(ValueError, match="progress: expected a number from 0 to 1, got 2"):
        tc.methods.d3s().prepare(batch, progress=2)
    with pytest.raises(ValueError, match=r"d3s: rows_start: expected a number above 0 and at most 1 .* got 0"):
        tc.methods.d3s(rows_start=0.0)


def test_equal_rewards_everywhere_train_nothing():
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"entropies"})
    batch.rewards.fill_(1.0)
    objective = tc.methods.d3s()
    prepared = objective.prepare(batch, progress=0.0)
    log_probs = current.clone().requires_grad_()
    objective.loss(prepared, log_probs).loss.backward()
    assert not prepared.mask.any() and not log_probs.grad.any()


def test_defaults():
    assert tc.methods.d3s() == tc.Objective(
        filters=(
            varied_rows(tc.schedule.linear(0.25, 1.0)),
            tc.filters.top_share(
                tc.schedule.linear(0.2, 1.0),
                tc.token_score.given("entropies"),
                times_advantage=True,
                per_row=False,
                round_up=True,
            ),
        ),
        aggregation=tc.aggregation.token_mean(),
    )
