import naive
import pytest
import tokcredit as tc
import torch
from test_opd import one_row
from tokcredit.methods.iw_opd import ahead_weighted


def test_formula():
    def formula(batch, log_probs):
        teacher, losses = batch.input("teacher_log_probs"), []
        for tokens in naive.rows_of(batch):
            gap = [(teacher[t] - batch.old_log_probs[t]).item() for t in tokens]
            total, row = max(sum(map(abs, gap)), 1e-8), []
            for i, t in enumerate(tokens):
                advantage = gap[i] * (1 + 0.7 * (1 - sum(map(abs, gap[:i])) / total))
                row.append(naive.clipped(advantage, (log_probs[t] - batch.old_log_probs[t]).exp(), 0.9, 1.1, 1.2))
            losses.append(row)
        return naive.token_mean(batch, losses)

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"teacher_log_probs"})
    naive.check(tc.methods.iw_opd(0.7, 0.1, 0.1, 1.2), batch, current, formula)


def test_by_hand():
    batch, new = one_row()
    objective = tc.methods.iw_opd()
    prepared = objective.prepare(batch)
    expected = [0.3, -1.447368421, 0.236842105, 0.565789474]
    assert prepared.advantages.tolist() == pytest.approx(expected, abs=1e-9)
    log_loss = -(prepared.advantages * new.detach()).mean()
    assert log_loss.item() == pytest.approx(-0.1372368421, abs=1e-10)
    # The ratio is exp(0.1) at the first and last token, exp(-0.1) at the second: inside the clip range.
    objective.loss(prepared, new).loss.backward()
    ratio = torch.tensor([0.1, -0.1, 0.0, 0.1], dtype=torch.float64).exp()
    torch.testing.assert_close(new.grad, -prepared.advantages * ratio / 4)


def test_a_row_that_agrees_with_its_teacher_has_no_advantage():
    batch, _ = one_row()
    batch.extras["teacher_log_probs"] = batch.old_log_probs.clone()
    assert tc.methods.iw_opd().prepare(batch).advantages.tolist() == [0.0] * 4


def test_defaults():
    assert tc.methods.iw_opd() == tc.Objective(
        ahead_weighted(tc.credit.distilled(1.0, 0.0, "old_log_probs"), 0.5),
        clip=tc.clip.ppo(0.2, 0.2, 3.0),
        aggregation=tc.aggregation.token_mean(),
    )
