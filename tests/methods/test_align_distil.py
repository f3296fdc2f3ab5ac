import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.align_distil import inverse_extrapolation, teacher, teacher_distance
from tokcredit.supervised import reverse_kl


def row(values):
    return torch.tensor([values], dtype=torch.float64)


STUDENT, MODEL, REVERSED = [0.3, 0.2, -0.1], [1.0, 0.0, -1.0], [0.0, 0.5, 0.0]


def with_distance(batch, distance):
    return batch.with_inputs(teacher_distance=distance.reshape(-1))


def test_formula():
    """Through the divergence itself, down to the student's logits."""
    g = torch.Generator().manual_seed(0)
    batch, _ = naive.random_batch()
    student, model, other = (2 * torch.randn(12, 7, 5, generator=g, dtype=torch.float64) for _ in range(3))
    objective = tc.methods.align_distil(0.2, 3.0, 0.01)
    batch = with_distance(batch, teacher_distance(model, other))
    ours = student.clone().requires_grad_()
    divergence = tc.divergence.between(ours, teacher(model, other, 3.0, 0.01), "reverse_kl")
    out = objective.loss(objective.prepare(batch), divergence)
    out.loss.backward()

    theirs = student.clone().requires_grad_()
    p, q, r = theirs.softmax(-1), model.softmax(-1), other.softmax(-1)
    alpha = 3.0 * (q - r).abs().sum(-1) + 0.01
    target = model + alpha[..., None] * (model - other)
    each = (0.2 / alpha * (p * (theirs.log_softmax(-1) - target.log_softmax(-1))).sum(-1)).reshape(-1)
    expected = naive.sequence_mean(batch, [[each[t] for t in own] for own in naive.rows_of(batch)])
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert ours.grad.abs().sum() > 0.1


def test_by_hand():
    distance = teacher_distance(row(MODEL), row(REVERSED))
    assert distance.item() == pytest.approx(0.7823446735)
    mixture = teacher(row(MODEL), row(REVERSED))
    assert mixture.weights.item() == pytest.approx(7.8244467345)
    batch = tc.Rollouts(torch.arange(1), torch.arange(2), torch.zeros(1).long(), torch.zeros(1))
    batch = with_distance(batch, distance)
    objective = tc.methods.align_distil()
    prepared = objective.prepare(batch)
    assert prepared.advantages.tolist() == pytest.approx([0.0127804564])
    student = row(STUDENT).requires_grad_()
    divergence = tc.divergence.between(student, mixture, "reverse_kl")
    assert divergence.item() == pytest.approx(7.9841912470)
    out = objective.loss(prepared, divergence)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.1020416076)
    assert student.grad[0].tolist() == pytest.approx([-0.044319907, 0.016645064, 0.027674844], abs=1e-9)


def test_equal_teachers():
    """The teacher is the model itself, and the weight is beta / epsilon."""
    mixture = teacher(row(MODEL), row(MODEL))
    assert mixture.weights.item() == pytest.approx(1e-3)
    student = row(STUDENT)
    torch.testing.assert_close(
        tc.divergence.between(student, mixture, "reverse_kl"),
        tc.divergence.between(student, row(MODEL), "reverse_kl"),
    )
    batch = tc.Rollouts(torch.arange(1), torch.arange(2), torch.zeros(1).long(), torch.zeros(1))
    batch = with_distance(batch, torch.zeros(1, dtype=torch.float64))
    assert tc.methods.align_distil().prepare(batch).advantages.item() == pytest.approx(100)


def test_distances_of_many_rows():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 4, 5, generator=g)
    whole = teacher_distance(x, y)
    assert whole.shape == (3, 4) and whole.dtype == torch.float32
    torch.testing.assert_close(whole, (x.softmax(-1) - y.softmax(-1)).abs().sum(-1))
    assert teacher_distance(x[:0], y[:0]).shape == (0, 4)
    far = teacher_distance(row([50.0, 0.0]), row([0.0, 50.0]))
    assert far.item() == pytest.approx(2)
    with pytest.raises(ValueError, match=r"other: expected \[3, 4, 5\], got \[3, 4, 4\]"):
        teacher_distance(x, y[..., 1:])
    with pytest.raises(ValueError, match="logits: expected"):
        teacher_distance(x[..., :0], y[..., :0])


@pytest.mark.parametrize(("name", "value"), [("strength", -1.0), ("strength", math.nan), ("epsilon", 0.0)])
def test_settings_of_the_teacher_are_those_of_the_method(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a number"):
        teacher(row(MODEL), row(REVERSED), **{name: value})
    with pytest.raises(ValueError, match=f"{name}: expected a number"):
        tc.methods.align_distil(**{name: value})


def test_defaults():
    weight = inverse_extrapolation(0.1, 10.0, 1e-3, "teacher_distance")
    assert tc.methods.align_distil() == tc.Supervised(
        reverse_kl(), token_weights=(weight,), aggregation=tc.aggregation.sequence_mean()
    )
