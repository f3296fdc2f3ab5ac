import itertools
import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.spae import step_potential


def credit_of(batch, alpha=0.5, xi=0.5, saturated=0.9):
    """Steps of each row as lists of tokens; then the formulas, step by step. Groups of equal rewards are absent."""
    acc, conf = (batch.extras[n].tolist() for n in ("answer_probs", "answer_confidences"))
    rows, r = naive.rows_of(batch), batch.rewards.tolist()
    kept = [g for g in naive.counted_rows(batch) if len({r[i] for i in g}) > 1]
    steps = {}
    for i in (i for g in kept for i in g):
        ends = [k for k, t in enumerate(rows[i]) if not math.isnan(acc[t])]
        cuts = [0, *(k + 1 for k in ends[:-1]), len(rows[i])]
        steps[i] = [rows[i][b:e] for b, e in itertools.pairwise(cuts)]
        phis = [1.5 * acc[t] * conf[t] + 0.5 * acc[t] - conf[t] for t in (rows[i][k] for k in ends)] or [0.0]
        steps[i] = [(s, p, p - q) for s, p, q in zip(steps[i], phis, [phis[0], *phis[:-1]], strict=True)]
    changes = [d for i in steps for _, _, d in steps[i]]
    low, high = min(changes), max(changes)
    jump = lambda d: math.exp((d - low) / (high - low) if high > low else 0)  # noqa: E731
    tokens = [(t, d) for i in steps for s, _, d in steps[i] for t in s]
    mean = sum(jump(d) for _, d in tokens) / len(tokens)
    out = {}
    for g in kept:
        baseline = sum(r[i] for i in g) / len(g)
        for i in g:
            count = 0
            for s, phi, d in steps[i]:
                f = 1 - alpha * (1 - math.exp(-count))
                out |= dict.fromkeys(s, (r[i] - baseline) * f + xi * (jump(d) - mean))
                count += phi > saturated
    x = list(out.values())
    mean = sum(x) / len(x)
    std = math.sqrt(sum((a - mean) ** 2 for a in x) / (len(x) - 1) + 1e-8)
    return {t: (a - mean) / std for t, a in out.items()}


@pytest.mark.parametrize("saturated", [0.9, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_formula(saturated, seed):
    batch, current = naive.random_batch(seed, length=9)
    batch = naive.with_inputs(batch, {"answer_probs", "answer_confidences"}, seed)
    batch.rewards[batch.group_index == 1] = 1.0

    def formula(batch, log_probs):
        credit = credit_of(batch, saturated=saturated)
        return sum(
            naive.clipped(a, (log_probs[t] - batch.old_log_probs[t]).exp(), 0.8, 1.28) for t, a in credit.items()
        ) / len(credit)

    naive.check(tc.methods.spae(saturated=saturated), batch, current, formula)


def row(acc, conf):
    """One solved row of two tokens a step, and an unsolved one of a token with nothing probed."""
    n, nan = len(acc), math.nan
    sparse = lambda x: torch.tensor([*(v for a in x for v in (nan, a)), nan, nan])  # noqa: E731
    return tc.Rollouts(
        torch.arange(2 * n + 2),
        torch.tensor([0, 2 * n + 1, 2 * n + 2]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.0]),
        extras={"answer_probs": sparse(acc), "answer_confidences": sparse(conf)},
    )


def test_by_hand():
    # All solved at once: the potential is 1 after every step, nothing jumps, and the outcome 0.5 fades.
    credit = step_potential()(row([1.0] * 4, [1.0] * 4))
    faded = [1, 1, 0.68394, 0.68394, 0.567668, 0.567668, 0.524894, 0.524894, 0.524894]
    assert credit[:9].tolist() == pytest.approx([0.5 * f for f in faded], abs=1e-5)
    assert credit[9].item() == pytest.approx(-0.5)
    # Potentials 0.125 and 0.7825: the second step jumps by all there is, e - 1 more than the others; nothing saturates.
    credit = step_potential()(row([0.5, 0.9], [0.5, 0.95]))
    mean = (3 + 3 * math.e) / 6
    assert credit.tolist() == pytest.approx(
        [*[0.5 + 0.5 * (1 - mean)] * 2, *[0.5 + 0.5 * (math.e - mean)] * 3, -0.5 + 0.5 * (1 - mean)], abs=1e-5
    )
    # The threshold lies between: the saturation of the last step fades nothing after it.
    low, high = (step_potential(saturated=s)(row([0.5, 0.9], [0.5, 0.95])) for s in (0.78, 0.12))
    torch.testing.assert_close(low, credit)
    torch.testing.assert_close(high[2:5], credit[2:5] - 0.5 * 0.5 * (1 - math.exp(-1)))


def test_groups_of_equal_rewards_are_left_out():
    batch = naive.with_inputs(naive.random_batch()[0], {"answer_probs", "answer_confidences"})
    batch.rewards[batch.group_index == 1] = 1.0
    prepared = tc.methods.spae().prepare(batch)
    equal = (batch.group_index == 1).repeat_interleave(7)
    assert not prepared.mask[equal].any() and not prepared.credit[equal].any()
    credit = prepared.credit[prepared.mask]
    assert credit.mean().abs() < 1e-9 and credit.std().item() == pytest.approx(1.0)


def test_defaults():
    assert tc.methods.spae() == tc.Objective(
        credit=tc.credit.whitened(
            step_potential(alpha=0.5, bonus=0.5, saturated=0.9), below=None, nonzero=False, epsilon=1e-8
        ),
        filters=(tc.filters.mixed_groups(),),
        clip=tc.clip.ppo(low=0.2, high=0.28, cap=None),
        aggregation=tc.aggregation.token_mean(),
    )
