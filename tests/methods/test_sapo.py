import naive
import tokcredit as tc
import torch


def test_formula():
    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch)
        losses = []
        for r, tokens in enumerate(naive.rows_of(batch)):
            tau = 1.0 if advantages[r] > 0 else 1.05
            ratios = [(log_probs[t] - batch.old_log_probs[t]).exp() for t in tokens]
            losses.append([-4 / tau * torch.sigmoid(tau * (q - 1)) * advantages[r] for q in ratios])
        return naive.sequence_mean(batch, losses)

    naive.check(tc.methods.sapo(), *naive.random_batch(), formula)


def test_by_hand():
    # On policy the gate's slope is exactly 1: the gradient is that of GRPO.
    batch, _ = naive.random_batch()
    for name in ("sapo", "grpo"):
        log_probs = batch.shaped(batch.old_log_probs.clone()).requires_grad_()
        objective = tc.methods.load(name)
        objective.loss(objective.prepare(batch), log_probs).loss.backward()
        if name == "sapo":
            sapo = log_probs.grad
    torch.testing.assert_close(sapo, log_probs.grad)
    assert sapo.abs().max() > 0.01


def test_defaults():
    assert tc.methods.sapo() == tc.Objective(clip=tc.clip.soft(tau_positive=1.0, tau_negative=1.05))
