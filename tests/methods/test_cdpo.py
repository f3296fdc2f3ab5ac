import golden_pair
import naive
import pytest
import tokcredit as tc
import torch
from golden_pair import softplus, total
from tokcredit.methods.cdpo import contrastive_log_probs, critical
from tokcredit.stages.link import logistic

POSITIVE = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
NEGATIVE = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(2))
def test_formula(seed):
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs", "contrastive_log_probs"})

    def formula(batch, log_probs):
        d = log_probs - batch.ref_log_probs
        s = batch.extras["contrastive_log_probs"].exp().nan_to_num()

        def loss(chosen, rejected):
            return softplus(-0.7 * (total(d, chosen) - total((1 - s) * d, rejected)))

        return golden_pair.mean_of_pairs(batch, loss)

    naive.check(tc.methods.cdpo(0.7), batch, current, formula)


def test_by_hand():
    scores = contrastive_log_probs(POSITIVE, NEGATIVE, torch.tensor([0, 1]))
    assert scores.exp().tolist() == pytest.approx([0.866813332, 0.211941558])
    # Of chosen rows nothing is read.
    batch = golden_pair.pair(contrastive_log_probs=([float("nan")] * 3, scores.tolist()))
    golden_pair.check(tc.methods.cdpo(), 0.4713091979, [-0.375815448] * 3 + [0.050053607, 0.296164537], batch)


def test_without_contrast_scores_are_those_of_the_first_model():
    tokens = torch.tensor([2, 0])
    found = contrastive_log_probs(POSITIVE, NEGATIVE, tokens, 0.0)
    torch.testing.assert_close(found, POSITIVE.log_softmax(1)[[0, 1], tokens])
    with pytest.raises(ValueError, match=r"negative: expected \[2, 3\], got \[2, 2\]"):
        contrastive_log_probs(POSITIVE, NEGATIVE[:, :2], tokens)


def test_improbable_tokens_are_dpo():
    """With s = 0 every token is critical."""
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    batch = batch.with_inputs(contrastive_log_probs=torch.full((batch.num_tokens,), -float("inf")))
    found = []
    for objective in (tc.methods.cdpo(0.3), tc.methods.dpo(0.3)):
        x = current.clone().requires_grad_()
        out = objective.loss(objective.prepare(batch), x)
        out.loss.backward()
        found.append((out.loss.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_defaults():
    assert tc.methods.cdpo() == tc.Preference((critical("contrastive_log_probs"),), link=logistic(1.0))
