import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.hapo import entropy_deviation, outside_center, token_group_average, widened

ENTROPIES = [0.01, 0.05, 0.1, 0.3, 0.4, 0.6, 0.8, 1, 1.5, 2]


def signal(entropies, pivot=0.8, literal_sign=False):
    x = [math.log(max(h, 1e-8)) for h in entropies]
    q = sorted(x)[round(pivot * (len(x) - 1))]
    s = math.sqrt(max(sum((a - q) ** 2 for a in x) / len(x), 1e-8))
    h = [(a - q) / s for a in x]
    high, low = max(max(h), 1e-8), min(min(h), -1e-8)
    return [a / high if a > 0 else a / (low if literal_sign else -low) for a in h]


def group_advantages(batch, limit_padding=False):
    r, lengths = batch.rewards.tolist(), [len(t) for t in naive.rows_of(batch)]
    out, plain = [0.0] * batch.num_rows, naive.group_advantages(batch)
    for rows in naive.group_rows(batch):
        tokens = [r[i] for i in rows for _ in range(lengths[i])]
        mean = sum(tokens) / len(tokens)
        std = math.sqrt(sum((x - mean) ** 2 for x in tokens) / len(tokens))
        for i in rows:
            out[i] = (r[i] - mean) / (std + 1e-6)
        extreme = [out[i] for i in rows if lengths[i]]
        if limit_padding and any(lengths[i] < 7 for i in rows):
            extreme.append((0 - mean) / (std + 1e-6))  # the reward of a padded position is 0
        if any(abs(a) >= 5 for a in extreme):
            for i in rows:
                out[i] = plain[i]
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("literal_sign", [False, True])
def test_formula(seed, literal_sign):
    batch, current = naive.random_batch(seed)
    batch = naive.with_inputs(batch, {"entropies"})

    def formula(batch, log_probs):
        tokens = [t for row in naive.rows_of(batch) for t in row]
        h = dict(zip(tokens, signal([batch.entropies[t].item() for t in tokens], 0.8, literal_sign), strict=True))
        losses = []
        for a, row in zip(group_advantages(batch), naive.rows_of(batch), strict=True):
            losses.append([])
            for t in row:
                low = 0.2 * (1 - h[t]) if h[t] <= 0 else 0.2
                high = 0.28 * (1 + h[t]) if h[t] > 0 else 0.28
                rho = (log_probs[t] - batch.old_log_probs[t]).exp()
                neutral = 1 - low / 2 < rho.item() < 1 + high / 2
                credit = a * (1 + h[t]) if (h[t] > 0) != neutral else a
                losses[-1].append(naive.clipped(credit, rho, 1 - low, 1 + high, 10.0))
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.hapo(literal_sign=literal_sign), batch, current, formula)


def flat(rewards, lengths, entropies=None):
    return tc.Rollouts(
        torch.zeros(sum(lengths), dtype=torch.long),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(len(lengths), dtype=torch.long),
        torch.tensor(rewards),
        entropies=None if entropies is None else torch.tensor(entropies, dtype=torch.float64),
    )


def test_by_hand():
    batch = flat([1.0, 0.0], [4, 6], ENTROPIES)
    intended = [-1, -0.65, -0.5, -0.26, -0.20, -0.11, -0.05, 0, 0.585, 1]
    score = entropy_deviation()
    assert score(batch).tolist() == pytest.approx(intended, abs=6e-3)
    literal = entropy_deviation(literal_sign=True)(batch)
    assert literal.tolist() == pytest.approx([abs(h) for h in intended], abs=6e-3)
    pivot, spread, low, high = score.statistics(batch)
    assert (pivot, spread) == pytest.approx((0.0, 1.968), abs=1e-3)
    assert (low, high) == pytest.approx((math.log(0.01) / spread, math.log(2) / spread))
    credit = token_group_average()(flat([1.0, 0.0], [10, 30]))
    assert credit[:, 0].tolist() == pytest.approx([1.732, -0.577], abs=1e-3)


def test_rare_outcomes_fall_back_to_the_mean_over_rows():
    # One correct token in 27: |A| is the root of 26 there, so the whole group has advantages over rows.
    credit = token_group_average()
    assert credit(flat([1.0, 0.0], [1, 26]))[:, 0].tolist() == pytest.approx([0.70711, -0.70711], abs=1e-4)
    assert credit(flat([1.0, 0.0], [1, 24]))[:, 0].tolist() == pytest.approx([24**0.5, -(24**-0.5)], abs=1e-4)
    assert credit(flat([0.7, 0.7, 0.7], [3, 5, 9])).tolist() == [[0.0], [0.0], [0.0]]


def test_on_policy_only_certain_tokens_change():
    batch = flat([1.0, 0.0], [5, 5], ENTROPIES)
    objective = tc.methods.hapo()
    log_probs = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    objective.loss(objective.prepare(batch), log_probs).loss.backward()
    h = entropy_deviation()(batch)
    expected = torch.where(h > 0, 1, 1 + h) / 10 * torch.tensor([-1.0] * 5 + [1.0] * 5)
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit_padding", [False, True])
def test_the_limit_at_padded_positions(limit_padding):
    """Rewards far from 0 compared with their spread: the release normalizes such groups over rows."""
    batch, current = naive.random_batch(5)
    batch = naive.with_inputs(batch, {"entropies"})
    batch.rewards.add_(2.5 * batch.group_index)
    objective = tc.methods.hapo(limit_padding=limit_padding)
    got = objective.credit(batch)[:, 0]
    counted = batch.lengths > 0
    expected, other = (
        torch.tensor(group_advantages(batch, p), dtype=torch.float64) for p in (limit_padding, not limit_padding)
    )
    torch.testing.assert_close(got[counted], expected[counted])
    assert not torch.allclose(got[counted], other[counted])
    assert objective.loss(objective.prepare(batch), current).loss.isfinite()


def test_the_limit_at_padded_positions_by_hand():
    # Rewards 10 of two tokens and 9 of three: mean 9.4 and std 0.49 over tokens, so 0 is 19 stds away.
    def credit(lengths, **settings):
        return token_group_average(**settings)(flat([10.0, 9.0], lengths))[:, 0].tolist()

    over_tokens = [0.6 / 0.24**0.5, -0.4 / 0.24**0.5]
    assert credit([2, 3]) == pytest.approx(over_tokens, rel=1e-5)
    assert credit([2, 3], limit_padding=True) == pytest.approx([0.70711, -0.70711], abs=1e-5)
    assert credit([3, 3], limit_padding=True) == pytest.approx([1, -1], abs=1e-5), "no padding"
    assert credit([2, 3], limit=1.0) == pytest.approx([0.70711, -0.70711], abs=1e-5)
    assert credit([1, 99], limit=math.inf) == pytest.approx([99**0.5, -(99**-0.5)], rel=1e-4)


def test_defaults():
    assert tc.decoding.temperature.AdaptiveTemperature().strength == 0.05
    score = entropy_deviation(pivot=0.8, literal_sign=False)
    assert tc.methods.hapo() == tc.Objective(
        credit=token_group_average(
            limit=5.0, epsilon=1e-6, otherwise=tc.credit.group_normalized(epsilon=1e-6), limit_padding=False
        ),
        clip=widened(score, low=0.2, high=0.28, widen=1.0, cap=10.0),
        scales=(outside_center(score, strength=1.0),),
        aggregation=tc.aggregation.token_mean(),
    )
