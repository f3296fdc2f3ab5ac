import naive
import pytest
import tokcredit as tc
import torch
from test_sdpo import case
from tokcredit import supervised
from tokcredit.methods.sdft import after


def test_formula():
    g = torch.Generator().manual_seed(0)
    batch = naive.with_inputs(naive.random_batch()[0], {"teacher_mask"})
    student, teacher = (2 * torch.randn(12, 7, 9, generator=g, dtype=torch.float64) for _ in range(2))
    objective = tc.methods.sdft(skip=2)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    out = objective.loss(objective.prepare(batch), objective.token_loss(ours, teacher))
    out.loss.backward()
    log_p, log_q = theirs.log_softmax(-1).view(-1, 9), teacher.log_softmax(-1).view(-1, 9)
    told, losses = batch.input("teacher_mask").tolist(), []
    for row, tokens in enumerate(naive.rows_of(batch)):
        if told[row]:
            losses.append([(i >= 2) * (log_q[t].exp() * (log_q[t] - log_p[t])).sum() for i, t in enumerate(tokens)])
    expected = naive.sequence_mean(batch, losses)
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-10)
    assert ours.grad.abs().sum() > 0.1


def test_by_hand():
    batch, student, teacher = case()
    objective = tc.methods.sdft(skip=1)
    value = objective.token_loss(student, teacher)
    assert value.tolist() == pytest.approx([0.246522726, 0.460252455], abs=1e-9)
    out = objective.loss(objective.prepare(batch), value)
    assert out.loss.item() == pytest.approx(0.2301262275, abs=1e-9)
    # As in the released code: the skipped token is not counted.
    codes = tc.mix(objective, filters=("marked('teacher_mask')", tc.filters.improbable(0.2)), token_weights=())
    assert codes.loss(codes.prepare(batch), value).loss.item() == pytest.approx(0.4602524551, abs=1e-9)


def test_a_row_without_a_demonstration_does_not_train():
    batch, student, teacher = case()
    batch.extras["teacher_mask"] = torch.tensor([False])
    objective = tc.methods.sdft()
    out = objective.loss(objective.prepare(batch), objective.token_loss(student, teacher))
    out.loss.backward()
    assert out.loss.item() == 0 and not student.grad.any()


def test_defaults():
    assert tc.methods.sdft() == tc.Supervised(
        supervised.forward_kl(),
        filters=(tc.filters.marked("teacher_mask"),),
        token_weights=(after(3),),
        aggregation=tc.aggregation.sequence_mean(),
    )
