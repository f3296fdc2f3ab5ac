import dataclasses

import golden_pair
import naive
import pytest
import tokcredit as tc
from golden_pair import softplus, total
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import f_divergence


@pytest.mark.parametrize("seed", range(2))
def test_formula(seed):
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs"})

    def formula(batch, log_probs):
        d = log_probs - batch.ref_log_probs

        def loss(chosen, rejected):
            a, b = (total(d, x) / max(len(x), 1) for x in (chosen, rejected))
            return softplus(-0.7 * (a - b))

        return golden_pair.mean_of_pairs(batch, loss)

    naive.check(tc.methods.sigmoid_norm(0.7), batch, current, formula)


def test_by_hand():
    # Log-ratios 0.1 -0.2 0.2 and -0.1 -0.5 have the means 1/30 and -0.3: z = 0.1 / 3.
    golden_pair.check(tc.methods.sigmoid_norm(), 0.6766193964, [-0.016388915] * 3 + [0.024583372] * 2)


@pytest.mark.parametrize(
    ("divergence", "value", "chosen", "rejected"),
    [
        ("forward_kl", 0.6712532154, -0.014746808, 0.044544637),
        ("js", 0.6837705299, -0.007842429, 0.015989344),
        ("alpha", 0.6742113041, -0.015550757, 0.033101363),
    ],
)
def test_golden_vectors(divergence, value, chosen, rejected):
    objective = tc.methods.sigmoid_norm(transform=f_divergence(divergence))
    golden_pair.check(objective, value, [chosen] * 3 + [rejected] * 2)


def test_rows_of_one_token_are_dpo():
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    first = batch.response_mask & (batch.shaped(batch.response_mask).cumsum(1) == 1).reshape(-1)
    batch = dataclasses.replace(batch, response_mask=first)
    naive.check_same((tc.methods.sigmoid_norm(), tc.methods.dpo()), batch, current)


def test_defaults():
    assert tc.methods.sigmoid_norm() == tc.Preference((), "ref_log_probs", "mean", logistic(beta=0.1), None)
