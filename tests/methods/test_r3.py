import dataclasses
import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.r3 import dominance, length_reward, pooled


def shaped_rewards(batch, share, best, limit):
    """Rewards with length bonus and rank rewards, row by row."""
    rows, r, h = naive.rows_of(batch), batch.rewards.tolist(), batch.entropies.tolist()
    replayed, truncated = (batch.extras[name].tolist() for name in ("replayed", "truncated"))
    out = [x + max(0.0, 1 - len(rows[i]) / limit) if x > 0.5 else x for i, x in enumerate(r)]
    for group in naive.group_rows(batch):
        fresh = [i for i in group if not replayed[i]]
        if any(r[i] > 0.5 for i in fresh):
            continue
        fresh = [i for i in fresh if rows[i]]
        ranked = [i for i in fresh if truncated[i]]
        shape = {}
        for i in ranked:
            own = sorted((h[t] for t in rows[i]), reverse=True)
            k = max(1, math.floor(share * len(own)))
            shape[i] = sum(own[:k]) / k, sum(own) / len(own)
        beaten = {
            i: sum(shape[i][0] > shape[j][0] and shape[i][1] < shape[j][1] for j in ranked if j != i) for i in ranked
        }
        order = sorted(ranked, key=lambda i: -beaten[i])
        for i in ranked:
            if len(ranked) == 1:
                out[i] += best if len(fresh) > 1 else 0.0
            else:
                ranks = [k for k, j in enumerate(order) if beaten[j] == beaten[i]]
                out[i] += sum(best * (1 - k / (len(ranked) - 1)) for k in ranks) / len(ranks)
    return out


def credit(batch, alpha, share, best, limit, epsilon):
    r, replayed, out = shaped_rewards(batch, share, best, limit), batch.extras["replayed"].tolist(), {}
    for group in naive.counted_rows(batch):
        mean = sum(r[i] for i in group) / len(group)
        std = math.sqrt(sum((r[i] - mean) ** 2 for i in group) / (len(group) - 1))
        factor = alpha if any(replayed[i] for i in group) else 1.0
        out |= {i: (r[i] - mean) / (factor * std + epsilon) for i in group}
    return out


def mixed_batch(seed):
    """Groups 0 and 1 all wrong, of which 0 has a replayed right row; 2 as it comes; 3 all right with replayed wrong."""
    batch, current = naive.random_batch(seed, groups=4, size=6, length=9)
    batch = naive.with_inputs(batch, {"entropies", "replayed", "truncated"}, seed)
    # A larger power raises peaks beside the mean, so that rows dominate others.
    power = (1 + torch.arange(24) % 5).repeat_interleave(9)
    batch = dataclasses.replace(batch, entropies=(batch.entropies / 1.2) ** power * (power + 1) ** 0.6)
    index, replayed = batch.group_index, torch.zeros(24, dtype=torch.bool)
    for group in (0, 3):
        replayed[(index == group).nonzero()[-1]] = True
    rewards = torch.where(index < 2, 0.0, torch.where(index == 3, 1.0, batch.rewards.clamp(max=1)))
    rewards = torch.where(replayed, 1 - rewards, rewards)
    return dataclasses.replace(batch, rewards=rewards, extras=batch.extras | {"replayed": replayed}), current


@pytest.mark.parametrize(("alpha", "share", "best"), [(1.0, 0.2, 0.5), (2.5, 0.35, 0.8)])
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_formula(alpha, share, best, seed):
    batch, current = mixed_batch(seed)

    def formula(batch, log_probs):
        advantages = credit(batch, alpha, share, best, 12, 1e-6)
        losses = naive.ppo(batch, log_probs, dict.fromkeys(range(24), 0.0) | advantages, 0.8, 1.2)
        return naive.sequence_mean(batch, losses)

    objective = tc.methods.r3(alpha, share, best, max_length=12)
    naive.check(objective, batch, current, formula)
    bonus = objective.credit.bonuses[1](batch)
    assert len(set(bonus[batch.group_index < 2].tolist())) > 2, "rows that are told apart"
    assert not bonus[(batch.group_index == 3) | batch.extras["replayed"]].any()


def shaped(entropies, rewards=None, truncated=None, replayed=None, groups=None):
    """Rows with these entropies."""
    n = len(entropies)
    flags = [[False] * n if x is None else x for x in (replayed, [True] * n if truncated is None else truncated)]
    flat = torch.tensor([h for row in entropies for h in row], dtype=torch.float32)
    return tc.Rollouts(
        torch.arange(len(flat), dtype=torch.int64),
        torch.tensor([0, *map(len, entropies)]).cumsum(0),
        torch.tensor(groups or [0] * n, dtype=torch.int64),
        torch.tensor(rewards or [0.0] * n),
        old_log_probs=torch.zeros(len(flat)),
        entropies=flat,
        extras=dict(zip(("replayed", "truncated"), (torch.tensor(x, dtype=torch.bool) for x in flags), strict=True)),
    )


# Largest entropy and mean 2 and 0.5, 1.5 and 0.4, 1.8 and 0.6, 2.2 and 0.7: only the first dominates one, the third.
FOUR = [[0.1, 2.0, 0.0, 0.1, 0.3], [1.5, 0.1, 0.2, 0.2, 0.0], [1.8, 0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 0.3, 2.2, 0.4]]


def test_by_hand():
    rank = dominance(best=1.0)
    third = 1 / 3
    assert rank(shaped(FOUR)).tolist() == pytest.approx([1, third, third, third])
    # The third finished by itself: nobody dominates, all are equal.
    assert rank(shaped(FOUR, truncated=[True, True, False, True])).tolist() == pytest.approx([0.5, 0.5, 0, 0.5])
    # Rewards 0.5, 1/6, 1/6, 1/6 of mean 1/4, deviations 1/4 and -1/12, sum of squares 1/12: std 1/6.
    assert tc.methods.r3().credit(shaped(FOUR))[:, 0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)
    # A replayed right row of 5 tokens (1.5 with a limit of 10), mean 0.5: deviations 0, -1/3 thrice, 1; their squares
    # add up to 4/3, std sqrt(1/3). Alpha 2 halves the advantages.
    five = shaped([*FOUR, [9.0] * 5], [0.0] * 4 + [1.0], [True] * 5, [False] * 4 + [True])
    got = tc.methods.r3(alpha=2.0, max_length=10).credit(five)[:, 0]
    assert got.tolist() == pytest.approx([0, *[-0.288675] * 3, 0.866025], abs=1e-5)
    alike = shaped([[1.0], [1.0]], [0.0, 0.0], [False, False], [False, True])
    assert tc.methods.r3(alpha=2.0, epsilon=0.0).credit(alike).tolist() == [[0], [0]]
    # The same row drawn now: the group is not all wrong, nobody is ranked. 0 four times and 1.5: std 0.670820.
    now = dataclasses.replace(five, extras=five.extras | {"replayed": torch.zeros(5, dtype=torch.bool)})
    got = tc.methods.r3(alpha=2.0, max_length=10).credit(now)[:, 0]
    assert got.tolist() == pytest.approx([-0.447214] * 4 + [1.788854], abs=1e-5)


def test_a_single_truncated_row():
    rank = dominance()
    assert rank(shaped([[1.0], [2.0]], truncated=[True, False])).tolist() == [0.5, 0]
    assert rank(shaped([[1.0]])).tolist() == [0], "nothing to contrast with"
    alone = shaped([[1.0], [2.0], []], [0.0, 1.0, 0.0], [True, True, False], [False, True, False])
    assert rank(alone).tolist() == [0, 0, 0], "neither replayed nor empty rows are a contrast"
    assert not tc.methods.r3().credit(shaped([[1.0]])).any()


def test_groups_do_not_mix_and_order_does_not_matter():
    # The rows of FOUR in two groups, interleaved: 0 and 2 (0 dominates), 1 and 3 (equal).
    got = dominance()(shaped(FOUR, groups=[7, 3, 7, 3]))
    assert got.tolist() == [0.5, 0.25, 0, 0.25]
    order = torch.tensor([2, 3, 0, 1])
    batch = shaped(FOUR)
    assert torch.equal(dominance()(batch.select(order)), dominance()(batch)[order])


def test_length_reward():
    batch = shaped([[1.0] * 3, [1.0] * 3, [1.0] * 20], [1.0, 0.5, 1.0])
    assert length_reward(limit=12)(batch).tolist() == [0.75, 0, 0]
    with pytest.raises(ValueError, match="length_reward: limit: expected a whole number at least 1, got 0"):
        length_reward(limit=0)
    with pytest.raises(ValueError, match="dominance: share: expected a number at least 0 and at most 1, got 2"):
        dominance(share=2)


def test_nothing_at_all():
    assert tc.methods.r3().credit(shaped([])).shape == (0, 1)
    assert not tc.methods.r3().credit(shaped([[], []])).any()


def test_marks_are_bool():
    batch = shaped(FOUR)
    with pytest.raises(TypeError, match=r"replayed: expected bool \[R\], got float32"):
        tc.methods.r3().credit(dataclasses.replace(batch, extras=batch.extras | {"replayed": torch.zeros(4)}))
    with pytest.raises(ValueError, match=r"replayed: expected bool \[4\], got bool \[3\]"):
        tc.methods.r3().prepare(dataclasses.replace(batch, extras=batch.extras | {"replayed": torch.ones(3) > 0}))


def test_defaults():
    assert tc.methods.r3() == tc.Objective(
        credit=pooled(
            (length_reward(limit=32768, threshold=0.5), dominance(share=0.2, best=0.5, threshold=0.5)),
            scale=1.0,
            epsilon=1e-6,
        )
    )
