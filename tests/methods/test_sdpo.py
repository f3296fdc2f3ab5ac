import dataclasses
import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit import supervised


def test_formula():
    g = torch.Generator().manual_seed(0)
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"teacher_mask"})
    student, teacher = (2 * torch.randn(12, 7, 9, generator=g, dtype=torch.float64) for _ in range(2))
    objective = tc.methods.sdpo(supervised.reverse_kl(), ratio_cap=1.1)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    log_probs = current.clone().requires_grad_()
    out = objective.loss(objective.prepare(batch), objective.token_loss(ours, teacher), log_probs=log_probs)
    out.loss.backward()
    log_p, log_q = theirs.log_softmax(-1).view(-1, 9), teacher.log_softmax(-1).view(-1, 9)
    told, losses = batch.input("teacher_mask").tolist(), []
    for row, tokens in enumerate(naive.rows_of(batch)):
        for t in tokens if told[row] else ():
            weight = min(math.exp(current.reshape(-1)[t] - batch.old_log_probs[t]), 1.1)
            losses.append(weight * (log_p[t].exp() * (log_p[t] - log_q[t])).sum())
    expected = sum(losses) / len(losses)
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-10)
    assert ours.grad.abs().sum() > 0.1 and log_probs.grad is None


def case():
    student = torch.tensor([[1, 0, -1, 0.5], [0.3, 0.2, -0.1, 0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.2, 0.8, -0.5, 0], [2, 0, 0, -1]], dtype=torch.float64)
    batch = tc.Rollouts(
        torch.tensor([0, 3]),
        torch.tensor([0, 2]),
        torch.tensor([0]),
        torch.tensor([0.0], dtype=torch.float64),
        old_log_probs=torch.tensor([-0.9, -2.4], dtype=torch.float64),
        extras={"teacher_mask": torch.tensor([True])},
    )
    return batch, student, teacher


def test_by_hand():
    batch, student, teacher = case()
    objective = tc.methods.sdpo(supervised.js(0.5))
    log_probs = student.detach().log_softmax(-1).gather(1, batch.tokens[:, None])[:, 0]
    assert log_probs.tolist() == pytest.approx([-0.746567269, -1.498751905], abs=1e-9)
    value, prepared = objective.token_loss(student, teacher), objective.prepare(batch)
    assert value.tolist() == pytest.approx([0.057412289, 0.115631067], abs=1e-9)
    (weights,) = prepared.factors(log_probs)
    assert weights.tolist() == pytest.approx([1.16582936, 2.0], abs=1e-8)
    out = objective.loss(prepared, value, log_probs=log_probs)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.1490975328, abs=1e-9)
    expected = [0.030557864, -0.031855597, -0.007879032, 0.009176765]
    assert student.grad[0].tolist() == pytest.approx(expected, abs=1e-9)
    expected = [-0.101394094, 0.036105789, 0.017526229, 0.047762076]
    assert student.grad[1].tolist() == pytest.approx(expected, abs=1e-9)


def test_tokens_beside_the_most_likely_of_the_student_are_one_outcome():
    _, student, teacher = case()
    value = tc.mix("sdpo", token_loss="js(0.5, top_k=2)").token_loss(student, teacher)
    assert value[0].item() == pytest.approx(0.0567187674, abs=1e-9)


def test_on_policy_every_weight_is_one():
    batch, student, teacher = case()
    batch = dataclasses.replace(batch, old_log_probs=None)
    objective = tc.methods.sdpo(supervised.js(0.5))
    value = objective.token_loss(student, teacher)
    out = objective.loss(objective.prepare(batch), value, log_probs=torch.tensor([-0.7, -1.5]).double())
    assert out.loss.item() == pytest.approx((0.057412289 + 0.115631067) / 2, abs=1e-8)


def test_log_probs_are_needed_and_nan_among_them_is_not_silent():
    batch, student, teacher = case()
    objective = tc.methods.sdpo(supervised.js(0.5))
    prepared, value = objective.prepare(batch), objective.token_loss(student, teacher)
    with pytest.raises(TypeError, match="log_probs"):
        objective.loss(prepared, value)
    out = objective.loss(prepared, value, log_probs=torch.tensor([-0.7, math.nan]).double())
    out.loss.backward()
    assert out.loss.isnan() and student.grad.isnan().any(1).tolist() == [False, True]


def test_defaults():
    assert tc.methods.sdpo() == tc.Supervised(
        supervised.js(0.5, top_k=100, top_of="student", outside="bucket"),
        filters=(tc.filters.marked("teacher_mask"),),
        scales=(tc.scale.truncated_ratio(2.0, 20.0),),
        aggregation=tc.aggregation.token_mean(),
    )
