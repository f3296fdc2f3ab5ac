import naive
import pytest
import tokcredit as tc
import torch

OLD, TEACHER, NEW = [-0.7, -1.0, -0.3, -1.5], [-0.5, -2.0, -0.1, -1.0], [-0.6, -1.1, -0.3, -1.4]


@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_formula(discount):
    def formula(batch, log_probs):
        teacher, losses = batch.input("teacher_log_probs"), []
        for tokens in naive.rows_of(batch):
            gap = [(teacher[t] - batch.old_log_probs[t]).item() for t in tokens]
            for i, t in enumerate(tokens):
                advantage = 1.5 * sum(x * discount**k for k, x in enumerate(gap[i:]))
                losses.append(-advantage * (log_probs[t] - batch.old_log_probs[t]).exp())
        return sum(losses) / len(losses)

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"teacher_log_probs"})
    naive.check(tc.methods.opd(1.5, discount), batch, current, formula)


def one_row():
    x = {n: torch.tensor(v, dtype=torch.float64) for n, v in (("old", OLD), ("teacher", TEACHER), ("new", NEW))}
    batch = tc.Rollouts(
        torch.arange(4),
        torch.tensor([0, 4]),
        torch.tensor([0]),
        torch.tensor([0.8], dtype=torch.float64),
        old_log_probs=x["old"],
        extras={"teacher_log_probs": x["teacher"]},
    )
    return batch, x["new"].requires_grad_()


def test_by_hand():
    batch, new = one_row()
    assert tc.methods.opd().prepare(batch).advantages.tolist() == pytest.approx([0.2, -1, 0.2, 0.5])
    later = tc.methods.opd(discount=0.9).prepare(batch).advantages
    assert later.tolist() == pytest.approx([-0.1735, -0.415, 0.65, 0.5])
    objective = tc.methods.opd()
    out = objective.loss(objective.prepare(batch), new)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.0171955562, abs=1e-10)
    assert new.grad.tolist() == pytest.approx([-0.055258546, 0.226209355, -0.05, -0.138146365], abs=1e-9)


def test_the_teachers_credit_is_added_to_another():
    batch, _ = one_row()
    objective = tc.mix("opd", credit=tc.credit.sum(naive.fixed(), tc.credit.distilled(0.5)))
    assert objective.prepare(batch).advantages.tolist() == pytest.approx([0.9, 0.3, 0.9, 1.05])


def test_a_missing_log_prob_of_the_teacher_is_not_silent():
    batch, new = one_row()
    batch.extras["teacher_log_probs"][2] = float("nan")
    objective = tc.methods.opd()
    out = objective.loss(objective.prepare(batch), new)
    out.loss.backward()
    assert out.loss.isnan() and new.grad.isnan().tolist() == [False, False, True, False]


def test_the_expected_gradient_is_that_of_the_reverse_kl():
    """Every token of the vocabulary, weighted by its probability under the policy that sampled."""
    student = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.2, 0.8, -0.5, 0.0], dtype=torch.float64).log_softmax(0)
    log_p = student.log_softmax(0)
    batch = tc.Rollouts(
        torch.arange(4),
        torch.arange(5),
        torch.zeros(4, dtype=torch.long),
        torch.zeros(4, dtype=torch.float64),
        old_log_probs=log_p.detach(),
        extras={"teacher_log_probs": teacher},
    )
    objective = tc.mix("opd", aggregation="token_sum")
    each = [objective.loss(objective.prepare(batch).select([v]), log_p[v : v + 1]).loss for v in range(4)]
    sum(p.item() * x for p, x in zip(log_p.exp(), each, strict=True)).backward()
    assert student.grad.tolist() == pytest.approx([0.212648109, -0.200765513, -0.054613199, 0.042730603], abs=1e-8)


def test_defaults():
    assert tc.methods.opd() == tc.Objective(
        tc.credit.distilled(1.0, 0.0, "old_log_probs"),
        clip=tc.clip.unclipped(),
        aggregation=tc.aggregation.token_mean(),
    )
