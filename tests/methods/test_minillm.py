import statistics

import naive
import pytest
import tokcredit as tc
import torch
from test_opd import one_row
from tokcredit.methods.minillm import mean_ahead, teacher_kl


def averaged(batch, discount):
    teacher, out = batch.input("teacher_log_probs"), []
    for tokens in naive.rows_of(batch):
        gap = [(teacher[t] - batch.old_log_probs[t]).item() for t in tokens]
        out.append([sum(x * discount**k for k, x in enumerate(gap[i:])) / (len(gap) - i) for i in range(len(gap))])
    return out


def test_formula():
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"teacher_log_probs", "reverse_kl"})
    objective = tc.methods.minillm(0.8, 0.3, 0.1, 0.15)
    returns = averaged(batch, 0.8)
    flat = [x for row in returns for x in row]
    mean, variance = statistics.fmean(flat), statistics.variance(flat)
    ours, theirs = current.clone().requires_grad_(), current.clone().requires_grad_()
    kl = batch.shaped(batch.input("reverse_kl")).clone().requires_grad_()
    out = objective.loss(objective.prepare(batch), ours, reverse_kl=kl)
    out.loss.backward()
    log_probs, losses = theirs.reshape(-1), []
    for row, tokens in zip(returns, naive.rows_of(batch), strict=True):
        for x, t in zip(row, tokens, strict=True):
            advantage = (x - mean) / (variance + 1e-8) ** 0.5
            losses.append(naive.clipped(advantage, (log_probs[t] - batch.old_log_probs[t]).exp(), 0.9, 1.15))
    chosen = batch.shaped(batch.response_mask)
    expected = sum(losses) / len(losses) + 0.3 * kl.detach()[chosen].mean()
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(kl.grad, chosen.double() * 0.3 / len(losses))
    assert theirs.grad.abs().sum() > 0.1 and out.metrics["reverse_kl"] > 0


def test_by_hand():
    batch, _ = one_row()
    found = mean_ahead(tc.credit.distilled(), 0.95)(batch)
    assert found.tolist() == pytest.approx([-0.035203125, -0.119583333, 0.3375, 0.5], abs=1e-9)
    whitened = tc.methods.minillm().prepare(batch).advantages
    torch.testing.assert_close(whitened, (found - found.mean()) / found.std(), rtol=1e-6, atol=0)


def test_defaults():
    assert tc.methods.minillm() == tc.Objective(
        tc.credit.whitened(mean_ahead(tc.credit.distilled(1.0, 0.0, "old_log_probs"), 0.95)),
        clip=tc.clip.ppo(0.2, 0.2),
        aggregation=tc.aggregation.token_mean(),
        terms=(teacher_kl(1.0),),
    )
