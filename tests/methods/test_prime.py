import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.prime import accuracy_within, implicit_process, outcome_loss


def advantages_of(batch, beta=0.05, process=5.0, outcome=5.0):
    tokens, x = naive.rows_of(batch), batch.extras["implicit_rewards"].tolist()
    q = {t: beta * x[t] if t != row[-1] else 0.0 for row in tokens for t in row}
    divisor = max(abs(v) for row in tokens for v in naive.to_go([q[t] for t in row])) + 1e-6
    q = {t: v / divisor for t, v in q.items()}
    found = {}
    for rows in naive.counted_rows(batch):
        n = len(rows)
        means = sum(sum(q[t] for t in tokens[r]) / len(tokens[r]) for r in rows)
        total = sum(batch.rewards[r].item() for r in rows)
        for r in rows:
            own = [process * (n / (n - 1) * q[t] - means / (n - 1)) for t in tokens[r]]
            own[-1] += outcome * (n / (n - 1) * batch.rewards[r].item() - total / (n - 1))
            found |= dict(zip(tokens[r], naive.to_go(own), strict=True))
    return naive.whitened(found)


def test_formula():
    def formula(batch, log_probs):
        groups = [[batch.rewards[r].item() for r in rows] for rows in naive.counted_rows(batch)]
        keep = [0.4 <= sum(x) / len(x) <= 0.7 for x in groups]
        assert set(keep) == {True, False}
        rows = torch.tensor(keep)[batch.group_index]
        kept = batch.keeping(rows)
        advantages = advantages_of(kept)
        return naive.token_mean(kept, naive.token_ppo(kept, log_probs, advantages, 0.8, 1.2))

    batch, current = naive.random_batch(1)
    batch = naive.with_inputs(batch, {"implicit_rewards"})
    naive.check(tc.methods.prime(low=0.4, high=0.7), batch, current, formula)


def pair(**changes):
    arguments = {
        "tokens": torch.arange(5),
        "cu_seqlens": torch.tensor([0, 3, 5]),
        "group_ids": torch.zeros(2, dtype=torch.long),
        "rewards": torch.tensor([1.0, 0], dtype=torch.float64),
        "extras": {"implicit_rewards": torch.tensor([0.2, -0.1, 0.3, 0.1, -0.2], dtype=torch.float64)},
    }
    return tc.Rollouts(**arguments | changes)


def test_by_hand():
    assert implicit_process()(pair()).tolist() == pytest.approx(
        [2.50049990, -13.32966740, 0.83416650, -3.33366660, -9.16583350], rel=1e-7
    )
    advantages = tc.methods.prime().prepare(pair()).advantages.tolist()
    assert advantages == pytest.approx([1.04762633, -1.32173387, 0.79821999, 0.17440486, -0.69851732], rel=1e-7)


def test_the_loss_of_the_reward_model_by_hand():
    """Sums 0.4 and -0.1 with the outcomes 1 and 0; NaN lies under the mask, and an empty row does not count."""
    batch = tc.Rollouts(
        torch.arange(7),
        torch.tensor([0, 4, 7, 7]),
        torch.zeros(3, dtype=torch.long),
        torch.tensor([1.0, 0, 1], dtype=torch.float64),
        torch.tensor([True, False, True, True, True, True, False]),
    )
    ratio = torch.tensor([0.2, math.nan, -0.1, 0.3, 0.1, -0.2, math.inf], dtype=torch.float64, requires_grad=True)
    loss = outcome_loss(ratio, batch.spans, batch.rewards)
    assert loss.item() == pytest.approx(0.68692374, abs=1e-8)
    loss.backward()
    p = [1 / (1 + math.exp(-0.05 * x)) for x in (0.4, -0.1)]
    slopes = [0.05 * (p[0] - 1) / 2, 0.05 * p[1] / 2]
    expected = [slopes[0], 0, slopes[0], slopes[0], slopes[1], slopes[1], 0]
    assert ratio.grad.tolist() == pytest.approx(expected, rel=1e-12)
    nothing = outcome_loss(ratio, batch.spans.with_mask(torch.zeros(7, dtype=torch.bool)), batch.rewards)
    assert nothing.item() == 0


def test_the_loss_of_the_reward_model_is_checked():
    batch = pair()
    ratio = batch.extras["implicit_rewards"].clone()
    for wrong in (1.5, -0.1, math.nan):
        rewards = torch.tensor([0.5, wrong], dtype=torch.float64)
        with pytest.raises(ValueError, match=f"outcomes: expected numbers from 0 to 1, got {wrong}"):
            outcome_loss(ratio, batch.spans, rewards)
    ratio[1] = math.nan
    assert outcome_loss(ratio, batch.spans, batch.rewards).isnan(), "at a token that counts"


def test_a_group_of_one_is_an_error():
    with pytest.raises(ValueError, match="group_ids: expected at least two trajectories in each group for prime"):
        implicit_process()(pair(group_ids=torch.arange(2)))


def test_groups_that_are_too_easy_or_too_hard_are_left_out():
    rewards = torch.tensor([1.0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1])
    batch = tc.Rollouts(torch.arange(15), torch.arange(16), torch.arange(15) // 5, rewards)
    assert accuracy_within()(batch, None)[:, 0].tolist() == [True] * 5 + [False] * 5 + [True] * 5


def test_bounds_are_checked():
    with pytest.raises(ValueError, match=r"low: expected at most high, 0\.1, got 0\.9"):
        tc.methods.prime(low=0.9, high=0.1)


def test_defaults():
    assert tc.methods.prime() == tc.Objective(
        tc.credit.whitened(implicit_process(0.05, 5.0, 5.0)),
        filters=(accuracy_within(0.2, 0.8),),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.token_mean(),
    )
