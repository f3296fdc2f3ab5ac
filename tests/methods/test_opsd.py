import naive
import pytest
import tokcredit as tc
import torch
from test_sdpo import case
from tokcredit import supervised


def test_formula():
    g = torch.Generator().manual_seed(0)
    batch = naive.with_inputs(naive.random_batch()[0], {"teacher_mask"})
    student, teacher = (2 * torch.randn(12, 7, 9, generator=g, dtype=torch.float64) for _ in range(2))
    objective = tc.methods.opsd(supervised.forward_kl(cap=1.5))
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    out = objective.loss(objective.prepare(batch), objective.token_loss(ours, teacher, 1.1))
    out.loss.backward()
    log_p, log_q = ((x / 1.1).log_softmax(-1).view(-1, 9) for x in (theirs, teacher))
    told, losses, capped = batch.input("teacher_mask").tolist(), [], 0
    for row, tokens in enumerate(naive.rows_of(batch)):
        for t in tokens if told[row] else ():
            value = (log_q[t].exp() * (log_q[t] - log_p[t])).sum()
            losses.append(value * min(1, 1.5 / value.item()))
            capped += value.item() > 1.5
    expected = sum(losses) / len(losses)
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-10)
    assert 0 < capped < len(losses)


def test_by_hand():
    batch, student, teacher = case()
    objective = tc.methods.opsd()
    out = objective.loss(objective.prepare(batch), objective.token_loss(student, teacher))
    assert out.loss.item() == pytest.approx((0.246522726 + 0.460252455) / 2, abs=1e-8)


def test_defaults():
    assert tc.methods.opsd() == tc.Supervised(
        supervised.forward_kl(), filters=(tc.filters.marked("teacher_mask"),), aggregation=tc.aggregation.token_mean()
    )
