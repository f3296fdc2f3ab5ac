import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.canon import by_mean_reward, conditional, length, mean_entropy, order


def halves_of(rows, metric):
    order = sorted(rows, key=lambda r: metric[r])
    return order[: len(rows) // 2], order[len(rows) // 2 :]


def metrics(batch, by_length):
    tokens = naive.rows_of(batch)
    if by_length:
        return [len(t) for t in tokens]
    return [sum(batch.entropies[i].item() for i in t) / max(len(t), 1) for t in tokens]


def mean(rewards, rows):
    return sum(rewards[r] for r in rows) / len(rows) if rows else 0.0


def advantages(batch, by_length, mu, alpha=1.0, offset=0.0, groups=naive.counted_rows):
    """The four weighted equations, one for each half of each variant."""
    r, out = batch.rewards.tolist(), [0.0] * batch.num_rows
    for rows in groups(batch):
        low, high = halves_of(rows, metrics(batch, by_length))
        below, above = mean(r, low), mean(r, high)
        for i in rows:
            if by_length:
                inter = alpha * r[i] - below + offset if i in high else r[i] - alpha * above - offset
            else:
                inter = r[i] - alpha * below + offset if i in high else alpha * r[i] - above - offset
            intra = r[i] - ((above if i in high else below) if len(rows) > 1 else 0.0)
            out[i] = mu * inter + (1 - mu) * intra
    return out


def loss(batch, log_probs, advantages, length=7, cap=None):
    losses = naive.ppo(batch, log_probs, advantages, 0.8, 1.28, cap)
    return sum(map(sum, losses)) / sum(map(bool, losses)) / length


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(
    ("mu", "alpha", "offset"), [(1.0, 1.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.7, 0.1), (0.4, 0.9, 0.0)]
)
def test_formula(by_length, mu, alpha, offset):
    batch, current = naive.random_batch(groups=4, size=3)
    batch = naive.with_inputs(batch, {"entropies"})

    def formula(batch, log_probs):
        return loss(batch, log_probs, advantages(batch, by_length, mu, alpha, offset))

    naive.check(tc.methods.canon(by_length, between=mu, alpha=alpha, offset=offset), batch, current, formula)


@pytest.mark.parametrize("count_empty", [False, True])
def test_rows_without_a_chosen_token(count_empty):
    batch = naive.with_inputs(naive.random_batch()[0], {"entropies"})
    credit = conditional(between=0.3, count_empty=count_empty)
    groups = naive.group_rows if count_empty else naive.counted_rows
    counted = batch.lengths > 0
    expected = torch.tensor(advantages(batch, False, 0.3, groups=groups), dtype=torch.float64)
    torch.testing.assert_close(credit(batch)[counted, 0], expected[counted])
    other = conditional(between=0.3, count_empty=not count_empty)
    assert not torch.allclose(other(batch)[counted, 0], expected[counted])


def test_dual_clip_of_the_release():
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"entropies"})
    current = current + torch.arange(7) * 0.2  # ratios up to 3 at late tokens

    def formula(batch, log_probs):
        return loss(batch, log_probs, advantages(batch, False, 1.0), cap=1.5)

    out = naive.check(tc.methods.canon(between=1.0, cap=1.5), batch, current, formula)
    assert out.metrics["clip_cap_fraction"] > 0


@pytest.mark.parametrize("released", [False, True])
def test_dynamic(released):
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"entropies"})
    counted = [r for rows in naive.counted_rows(batch) for r in rows]
    accuracy = mean(batch.rewards.tolist(), counted)
    assert len(counted) < batch.num_rows
    objective = tc.methods.canon(between=by_mean_reward(0, 1)) if released else tc.methods.canon()

    def formula(batch, log_probs):
        return loss(batch, log_probs, advantages(batch, False, accuracy if released else 1 - accuracy))

    naive.check(objective, batch, current, formula)
    assert objective.compares_groups and not tc.methods.canon(between=0.5).compares_groups


@pytest.mark.parametrize("inside_first", [False, True])
def test_cosine_schedule(inside_first):
    start, peak, trough = (1, 0.4, 1) if inside_first else (0, 1, 0.4)
    schedule = tc.schedule.cosine_restarts(start, peak, trough, steps=150, warmup=30, period=40)
    for s in range(150):
        if s < 30:
            expected = 1 - 0.6 * (s + 1) / 30 if inside_first else (s + 1) / 30
        else:
            wave = 0.3 * (1 + math.cos(math.pi * ((s - 30) % 40) / 40))
            expected = 1 - wave if inside_first else 0.4 + wave
        assert schedule(s / 149) == pytest.approx(expected)
    batch = naive.with_inputs(naive.random_batch()[0], {"entropies"})
    scheduled = tc.methods.canon(between=schedule).prepare(batch, progress=31 / 149)
    fixed = tc.methods.canon(between=schedule(31 / 149)).prepare(batch)
    assert torch.equal(scheduled.advantages, fixed.advantages) and scheduled.objective == fixed.objective


def one_group(rewards, entropies):
    n = len(rewards)
    return tc.Rollouts(
        torch.arange(n),
        torch.arange(n + 1),
        torch.zeros(n, dtype=torch.long),
        torch.tensor(rewards),
        entropies=torch.tensor(entropies),
    )


def test_by_hand():
    batch = one_group([1.0, 0.0, 1.0, 1.0], [0.9, 0.8, 0.2, 0.1])
    for mu, expected in ((1.0, [0, -1, 0.5, 0.5]), (0.0, [0.5, -0.5, 0, 0]), (0.5, [0.25, -0.75, 0.25, 0.25])):
        assert tc.methods.canon(between=mu).prepare(batch).advantages.tolist() == pytest.approx(expected)
    dr_grpo = tc.methods.dr_grpo().prepare(batch).advantages
    torch.testing.assert_close(tc.methods.canon(between=0.5).prepare(batch).advantages, dr_grpo)


def test_ties_go_by_order_and_a_group_of_one_keeps_its_reward():
    batch = one_group([1.0, 0.0, 0.0], [0.5, 0.5, 0.5])  # low half: the first row
    assert tc.methods.canon(between=1.0).prepare(batch).advantages.tolist() == [1.0, -1.0, -1.0]
    for mu in (0.0, 1.0):
        assert tc.methods.canon(between=mu).prepare(one_group([2.0], [0.3])).advantages.tolist() == [2.0]
    assert not tc.methods.canon(between=0.3).prepare(one_group([0.7] * 5, [0.1, 0.2, 0.3, 0.4, 0.5])).advantages.any()


def test_control_splits_by_order():
    batch = one_group([1.0, 0.0, 1.0, 1.0], [0.9, 0.8, 0.2, 0.1])
    assert conditional(order())(batch)[:, 0].tolist() == [0.0, -1.0, 0.5, 0.5]


def test_defaults():
    assert tc.methods.canon() == tc.Objective(
        credit=conditional(
            mean_entropy(), by_mean_reward(failed=1.0, solved=0.0), high=1.0, low=1.0, offset=0.0, count_empty=False
        ),
        clip=tc.clip.ppo(low=0.2, high=0.28, cap=None),
        aggregation=tc.aggregation.sequence_sum(None),
    )
    assert tc.methods.canon(by_length=True).credit.metric == length()
