import golden_pair
import naive
import pytest
import tokcredit as tc
import torch
from golden_pair import softplus, total
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import sequential_kl


@pytest.mark.parametrize("seed", range(2))
def test_formula(seed):
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs"})

    def formula(batch, log_probs, ref_forward_kl):
        d = log_probs - batch.ref_log_probs

        def loss(chosen, rejected):
            delta = total(d, chosen) - total(d, rejected)
            divergence = total(ref_forward_kl, rejected) - total(ref_forward_kl, chosen)
            return softplus(-0.7 * (delta - divergence))

        return golden_pair.mean_of_pairs(batch, loss)

    objective = tc.methods.tdpo1(0.7)
    assert objective.variables == ("log_probs", "ref_forward_kl")
    naive.check(objective, batch, current, formula)


def test_by_hand():
    rows = [
        [-0.020062716, 0.014667020, 0.005395695],
        [0.012266156, -0.027248074, 0.014981917],
        [-0.013957408, -0.023011875, 0.036969283],
    ]
    out = golden_pair.check_logits(tc.methods.tdpo1(), 0.6851486127, rows)
    # Log-ratios 0.110753 -0.160904 | -0.183495, divergences 0.010598 0.042725 | 0.026051.
    assert out.metrics["ref_forward_kl_chosen_mean"].item() == pytest.approx(0.010598 + 0.042725, abs=1e-6)
    assert out.metrics["ref_forward_kl_rejected_mean"].item() == pytest.approx(0.026051, abs=1e-6)
    assert out.metrics["margin_mean"].item() == pytest.approx(0.133344 + 0.027272, abs=2e-6)


def test_the_policys_own_distribution_cancels():
    """The gradient of a token's logits is that of the reference: a factor of the pair times 1[v = token] - p_ref(v)."""
    batch, policy, reference = golden_pair.logits_pair()
    objective = tc.methods.tdpo1()
    divergence = tc.divergence.between(policy, reference, "forward_kl")
    log_probs = tc.log_probs.from_logits(policy, batch.tokens)
    objective.loss(objective.prepare(batch), log_probs, ref_forward_kl=divergence).loss.backward()
    score = torch.nn.functional.one_hot(batch.tokens, 3) - reference.softmax(1)
    factors = policy.grad / score
    torch.testing.assert_close(factors, factors[:1, :1] * torch.tensor([[1.0], [1.0], [-1.0]]).double().expand(3, 3))


def test_variables_are_checked():
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    prepared = tc.methods.tdpo1().prepare(batch)
    with pytest.raises(TypeError, match="ref_forward_kl: expected by name because the objective differentiates it"):
        tc.methods.tdpo1().loss(prepared, current)
    with pytest.raises(ValueError, match=r"ref_forward_kl: expected \[12, 7\], got \[12, 6\]"):
        tc.methods.tdpo1().loss(prepared, current, ref_forward_kl=current[:, 1:])


def test_defaults():
    assert tc.methods.tdpo1() == tc.Preference(link=logistic(0.1), divergence=sequential_kl(1.0, (), True))
