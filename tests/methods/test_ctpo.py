import math

import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cap", [0.05, None])
@pytest.mark.parametrize("token_mean", [True, False])
def test_formula(seed, cap, token_mean):
    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch)
        losses = []
        for r, tokens in enumerate(naive.rows_of(batch)):
            total, row = 0.0, []
            for position, t in enumerate(tokens, start=1):
                total += (log_probs[t] - batch.old_log_probs[t]).item()
                log_q = total + log_probs[t] - log_probs[t].detach()
                s = math.sqrt(position)
                limit = None if cap is None else math.exp(cap * s)
                low, high = math.exp(-0.025 * s), math.exp(0.05 * s)
                row.append(naive.clipped(advantages[r], log_q.exp(), low, high, limit))
            losses.append(row)
        return (naive.token_mean if token_mean else naive.sequence_mean)(batch, losses)

    out = naive.check(tc.methods.ctpo(cap=cap, token_mean=token_mean), *naive.random_batch(seed), formula)
    assert out.metrics["clip_high_fraction"] > 0 and (out.metrics["clip_cap_fraction"] > 0) == (cap is not None)


def test_by_hand():
    batch = tc.Rollouts(
        torch.arange(5),
        torch.tensor([0, 4, 5]),
        torch.zeros(2, dtype=torch.long),
        torch.tensor([1.0, 0.0]),
        torch.tensor([True, True, False, True, True]),
        old_log_probs=torch.zeros(5),
    )
    # Sums 0.04, 0.08, 0.09 against bounds 0.05, 0.0707, 0.0866: the last two are stopped.
    log_probs = torch.tensor([0.04, 0.04, -0.2, 0.01, 0.0], requires_grad=True)
    objective = tc.methods.ctpo()
    out = objective.loss(objective.prepare(batch), log_probs)
    out.loss.backward()
    advantage = 0.5 / math.sqrt(0.5)
    expected = -advantage / 4 * (math.exp(0.04) + math.exp(0.05 * math.sqrt(2)) + math.exp(0.05 * math.sqrt(3)) - 1)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert log_probs.grad.tolist() == pytest.approx([-advantage / 4 * math.exp(0.04), 0, 0, 0, advantage / 4], rel=1e-5)
    assert out.metrics["clip_high_fraction"].item() == pytest.approx(2 / 4)


def test_tokens_of_negative_rows_are_stopped_on_both_sides():
    batch = tc.Rollouts(
        torch.arange(4),
        torch.tensor([0, 1, 2, 3, 4]),
        torch.zeros(4, dtype=torch.long),
        torch.tensor([1.0, 0.0, 0.0, 0.0]),
        old_log_probs=torch.zeros(4),
    )
    log_probs = torch.tensor([0.04, 0.06, -0.03, 0.01], requires_grad=True)
    objective = tc.methods.ctpo()
    objective.loss(objective.prepare(batch), log_probs).loss.backward()
    assert [g != 0 for g in log_probs.grad.tolist()] == [True, False, False, True]


def test_ratio_is_bounded():
    batch = tc.Rollouts(
        torch.arange(2),
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.0]),
        old_log_probs=torch.tensor([0.0, -15.0]),
    )
    log_probs = torch.zeros(2, requires_grad=True)
    objective = tc.methods.ctpo(cap=None)
    out = objective.loss(objective.prepare(batch), log_probs)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((math.exp(10) - 1) / 2 * 0.70711, rel=1e-4)
    assert log_probs.grad[1] == 0


def test_defaults():
    assert tc.methods.ctpo() == tc.Objective(
        ratio=tc.ratio.cumulative(bound=20.0, high=10.0, to="old_log_probs"),
        clip=tc.clip.growing(low=0.025, high=0.05, power=0.5, cap=0.05),
        aggregation=tc.aggregation.token_mean(),
    )
