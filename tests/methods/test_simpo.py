import golden_pair
import naive
import pytest
import tokcredit as tc
from golden_pair import softplus, total
from tokcredit.stages.link import logistic


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(2))
def test_formula(seed, smoothing):
    batch, current = naive.random_pairs(seed)

    def formula(batch, log_probs):
        def loss(chosen, rejected):
            a, b = (total(log_probs, x) / max(len(x), 1) for x in (chosen, rejected))
            z = 2.5 * (a - b - 0.4)
            return (1 - smoothing) * softplus(-z) + smoothing * softplus(z)

        return golden_pair.mean_of_pairs(batch, loss)

    objective = tc.methods.simpo(2.5, 0.4, smoothing)
    naive.check(objective, batch, current, formula)
    assert not objective.required_inputs


def test_by_hand():
    # Means -17/30 and -1.2, so z = 2.5 * (19/30 - 0.55).
    golden_pair.check(tc.methods.simpo(2.5, 0.55), 0.5943960779, [-0.373420194] * 3 + [0.560130291] * 2)


def test_defaults():
    assert tc.methods.simpo() == tc.Preference(
        (), None, "mean", logistic(beta=2.0, margin=0.5, label_smoothing=0.0), None
    )


def test_the_setting_at_fault_is_named():
    with pytest.raises(ValueError, match="simpo: gamma_beta_ratio: expected a number at least 0, got"):
        tc.methods.simpo(gamma_beta_ratio=-0.1)
