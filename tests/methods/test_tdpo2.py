import golden_pair
import naive
import pytest
import tokcredit as tc
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
            divergence = total(ref_forward_kl, rejected) - total(ref_forward_kl, chosen).detach()
            return softplus(-0.7 * (delta - 0.3 * divergence))

        return golden_pair.mean_of_pairs(batch, loss)

    naive.check(tc.methods.tdpo2(0.7, 0.3), batch, current, formula)


def test_by_hand():
    rows = [
        [-0.016614947, 0.012146500, 0.004468448],
        [0.019041616, -0.030590940, 0.011549324],
        [-0.012243101, -0.025810923, 0.038054024],
    ]
    golden_pair.check_logits(tc.methods.tdpo2(), 0.6858251876, rows)


def test_without_divergence_it_is_dpo():
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    naive.check_same((tc.methods.tdpo2(alpha=0.0), tc.methods.dpo()), batch, current)


def test_defaults():
    assert tc.methods.tdpo2() == tc.Preference(link=logistic(0.1), divergence=sequential_kl(0.5, (), False))
