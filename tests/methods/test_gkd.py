import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit import supervised

STUDENT, TEACHER = [1.0, 0.0, -1.0, 0.5], [0.2, 0.8, -0.5, 0.0]


@pytest.mark.parametrize(
    ("token_loss", "share"),
    [(None, 0.5), (supervised.js(0.1), 0.1), (supervised.forward_kl(), 0), (supervised.reverse_kl(), 1)],
)
def test_formula(token_loss, share):
    """Through the divergence, down to the student's logits."""
    g = torch.Generator().manual_seed(0)
    batch = naive.random_batch()[0]
    student, teacher = (2 * torch.randn(12, 7, 5, generator=g, dtype=torch.float64) for _ in range(2))
    objective = tc.methods.gkd(token_loss)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    out = objective.loss(objective.prepare(batch), objective.token_loss(ours, teacher))
    out.loss.backward()
    p, q = theirs.softmax(-1), teacher.softmax(-1)
    m = share * q + (1 - share) * p
    if share in (0, 1):
        of, to = ((q, p), (p, q))[share]
        each = (of * (of.log() - to.log())).sum(-1)
    else:
        each = share * (q * (q / m).log()).sum(-1) + (1 - share) * (p * (p / m).log()).sum(-1)
    expected = each[batch.shaped(batch.response_mask)].mean()
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9)
    assert ours.grad.abs().sum() > 0.01


def rows(values):
    return torch.tensor([values], dtype=torch.float64)


def batch_of(tokens):
    return tc.Rollouts(torch.arange(tokens), torch.tensor([0, tokens]), torch.tensor([0]), torch.tensor([0.0]))


def test_by_hand():
    """One token; values and gradients worked out apart from the library."""
    for token_loss, value, gradient in (
        (None, 0.0574122892, [0.052422532, -0.054648816, -0.013516613, 0.015742896]),
        (supervised.forward_kl(), 0.2465227256, [0.232295198, -0.266026697, -0.055874821, 0.089606321]),
        (supervised.js(0.9), 0.0202531969, [0.018920382, -0.018252381, -0.004884127, 0.004216127]),
        (
            supervised.forward_kl(top_k=2, top_of="teacher"),
            0.2131816924,
            [0.232295198, -0.266026697, 0.006153486, 0.027578013],
        ),
        (
            supervised.reverse_kl(top_k=2),
            0.2228648374,
            [0.213601079, -0.187816031, -0.069093657, 0.043308609],
        ),
        (
            supervised.reverse_kl(top_k=2, outside="renormalised"),
            0.0107996846,
            [0.070501114, 0.0, 0.0, -0.070501114],
        ),
    ):
        objective, student = tc.methods.gkd(token_loss), rows(STUDENT).requires_grad_()
        out = objective.loss(objective.prepare(batch_of(1)), objective.token_loss(student, rows(TEACHER)))
        out.loss.backward()
        assert out.loss.item() == pytest.approx(value, abs=1e-9)
        assert student.grad[0].tolist() == pytest.approx(gradient, abs=1e-8)


def test_the_teacher_tells_the_rest_of_the_vocabulary_when_all_but_one_token_are_compared():
    whole, most = supervised.js(0.3), supervised.js(0.3, top_k=3)
    ours, theirs = rows(STUDENT).requires_grad_(), rows(STUDENT).requires_grad_()
    torch.testing.assert_close(whole(ours, rows(TEACHER), 0.7), most(theirs, rows(TEACHER), 0.7))
    whole(ours, rows(TEACHER), 0.7).sum().backward()
    most(theirs, rows(TEACHER), 0.7).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_cap_bounds_the_influence_of_a_token():
    objective = tc.methods.gkd(supervised.forward_kl(cap=0.1))
    value = torch.tensor([0.05, 0.4, 0.0, math.inf], dtype=torch.float64, requires_grad=True)
    out = objective.loss(objective.prepare(batch_of(4)), value)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((0.05 + 0.1 + 0.0 + 0.1) / 4)
    assert value.grad.tolist() == pytest.approx([1 / 4, 0.25 / 4, 1 / 4, 0])


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="outside: expected one of 'bucket', 'renormalised', got 'cut'"):
        supervised.js(0.5, top_k=4, outside="cut")
    with pytest.raises(ValueError, match="share"):
        supervised.js(1.0)
    with pytest.raises(TypeError, match="teacher: expected logits because of"):
        ids = torch.zeros(1, 1, dtype=torch.long)
        supervised.js(top_k=2)(rows(STUDENT), tc.divergence.Top(ids, torch.zeros(1, 1)))


@pytest.mark.parametrize("top_of", ["student", "teacher"])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 3), (4, 3, 5), (2, 4, 5), (2, 1, 5)])
def test_logits_of_another_shape_are_refused(shape, top_k, top_of):
    """Also those of which the ids of the top tokens could be taken."""
    token_loss = supervised.reverse_kl(top_k=top_k, top_of=top_of)
    with pytest.raises(ValueError, match=r"teacher: expected the shape of student, \[2, 3, 5\], got"):
        token_loss(torch.zeros(2, 3, 5), torch.zeros(shape))


def test_logits_must_be_floats():
    for top_k in (None, 2):
        with pytest.raises(TypeError, match="teacher: expected"):
            supervised.js(top_k=top_k)(torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.long))


def test_defaults():
    assert tc.methods.gkd() == tc.Supervised(
        supervised.js(0.5, top_k=None, top_of="student", outside="bucket", cap=float("inf")),
        aggregation=tc.aggregation.token_mean(),
    )
