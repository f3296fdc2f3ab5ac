import golden_pair
import naive
import pytest
import tokcredit as tc
from golden_pair import total
from tokcredit.stages.link import squared
from tokcredit.stages.pair import f_divergence


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_formula(seed, mean):
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs"})

    def formula(batch, log_probs):
        d = log_probs - batch.ref_log_probs

        def loss(chosen, rejected):
            a, b = (total(d, x) / (max(len(x), 1) if mean else 1) for x in (chosen, rejected))
            return (a - b - 1 / (2 * 0.3)) ** 2

        return golden_pair.mean_of_pairs(batch, loss)

    naive.check(tc.methods.ipo(0.3, mean=mean), batch, current, formula)


def test_by_hand():
    # Log-ratios 0.1 -0.2 0.2 and -0.1 -0.5: sums 0.1 and -0.6, so the difference is 0.7, wanted is 5.
    golden_pair.check(tc.methods.ipo(mean=False), 18.49, [-8.6] * 3 + [8.6] * 2)
    # Means 1/30 and -0.3: a difference of 1/3.
    golden_pair.check(tc.methods.ipo(), (1 / 3 - 5) ** 2, [-28 / 9] * 3 + [28 / 6] * 2)


@pytest.mark.parametrize(
    ("divergence", "value", "chosen", "rejected"),
    [
        ("reverse_kl", 21.7777777778, -3.111111111, 4.666666667),
        ("forward_kl", 20.7682517509, -2.749028628, 8.303795764),
        ("js", 23.1512967223, -1.523733584, 3.106626609),
        ("alpha", 21.3224835018, -2.928282084, 6.233145118),
    ],
)
def test_golden_vectors(divergence, value, chosen, rejected):
    objective = tc.methods.ipo(transform=f_divergence(divergence))
    golden_pair.check(objective, value, [chosen] * 3 + [rejected] * 2)


def test_defaults():
    assert tc.methods.ipo() == tc.Preference((), "ref_log_probs", "mean", squared(beta=0.1), None)
