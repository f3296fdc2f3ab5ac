import golden_pair
import naive
import pytest
import tokcredit as tc
import torch
from golden_pair import softplus, total
from tokcredit.methods.t_reg import contrasted, regularized
from tokcredit.methods.tgdpo import guided
from tokcredit.stages.link import logistic
from tokcredit.stages.token_score import given

ASKED = {
    "better_log_probs": ([-0.1, -1.5, -0.4], [-0.9, -1.0]),
    "worse_log_probs": ([-0.6, -0.9, -0.4], [-0.2, -1.8]),
}
INPUTS = {"ref_log_probs", "better_log_probs", "worse_log_probs"}


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("ratio", [None, 0.4])
def test_formula(ratio, constant):
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, INPUTS)

    def formula(batch, log_probs):
        reward = 1 / (1 + (batch.extras["worse_log_probs"] - batch.extras["better_log_probs"]).exp()) - 0.5
        reward = reward.nan_to_num()
        d = log_probs - (batch.ref_log_probs if ratio is None else 0)

        def loss(chosen, rejected):
            lengths = [1 if ratio is None else max(len(x), 1) for x in (chosen, rejected)]
            a, b = (total(d, x) / n for x, n in zip((chosen, rejected), lengths, strict=True))
            z = 0.7 * (a - b - (ratio or 0))
            weight = 1 / (1 + z.exp())
            of = [-0.7 * total(reward * log_probs, x) / n for x, n in zip((chosen, rejected), lengths, strict=True)]
            return softplus(-z) + 0.5 * (weight.detach() if constant else weight) * sum(of)

        return golden_pair.mean_of_pairs(batch, loss)

    objective = tc.methods.t_reg(0.7, 0.5, ratio, constant)
    assert objective.required_inputs == (INPUTS if ratio is None else INPUTS - {"ref_log_probs"})
    naive.check(objective, batch, current, formula)


def test_by_hand():
    batch = golden_pair.pair(**ASKED)
    gradient = [-0.049727902, -0.046493709, -0.048250714, 0.050279509, 0.045959113]
    out = golden_pair.check(tc.methods.t_reg(), 0.6610696720, gradient, batch)
    rewards = contrasted()(batch)[batch.response_mask].tolist()
    assert rewards == pytest.approx([0.122459, -0.145656, 0, -0.168188, 0.189974], abs=6e-7)
    # The pair has the weight 0.4825; both responses together L = -0.0121164480 + 0.0312673854.
    assert out.metrics["regularization_mean"].item() == pytest.approx(0.4825071482 * 0.0191509374, abs=3e-9)


@pytest.mark.parametrize(
    ("objective", "value", "gradient"),
    [
        (
            tc.methods.t_reg(constant_weight=False),
            0.6610696720,
            [-0.049847449, -0.046613256, -0.048370261, 0.050399056, 0.046078660],
        ),
        (
            tc.methods.t_reg(2.5, gamma_beta_ratio=0.55),
            0.6268692899,
            [-0.384852391, -0.359822442, -0.373420194, 0.583682057, 0.533527676],
        ),
    ],
)
def test_golden_vectors(objective, value, gradient):
    golden_pair.check(objective, value, gradient, golden_pair.pair(**ASKED))


def test_limit_cases():
    """Without regularization, or with the same prompt twice, it is DPO."""
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, INPUTS)
    same = batch.with_inputs(worse_log_probs=batch.extras["better_log_probs"].clone())
    naive.check_same((tc.methods.t_reg(alpha=0.0), tc.methods.dpo()), batch, current)
    naive.check_same((tc.methods.t_reg(), tc.methods.dpo()), same, current)


def test_the_gradient_is_that_of_weights_where_all_weights_of_the_score_are_1():
    """Where z is the same, factors 1 + alpha r and 1 - alpha r of DPO's gradient; TGDPO's form, not its value."""
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, INPUTS)
    _, found = naive.gradient(tc.methods.t_reg(0.1, 0.5), batch, current)
    _, plain = naive.gradient(tc.methods.dpo(), batch, current)
    objective = tc.Preference((guided(contrasted(), 0.5),))
    weights = objective.prepare(batch).advantages.abs()
    torch.testing.assert_close(found, plain * weights)


def test_without_gradient_the_value_is_the_same():
    batch = golden_pair.pair(**ASKED)
    objective = tc.methods.t_reg(constant_weight=False)
    current = golden_pair.laid_out(golden_pair.CHOSEN, golden_pair.REJECTED)
    loss = objective.loss(objective.prepare(batch), current).loss
    assert loss.item() == pytest.approx(0.6610696720, abs=1e-9) and not loss.requires_grad


def test_any_reward_of_tokens():
    term = regularized(0.5, given("entropies"))
    assert tc.Preference(pair_terms=(term,)).required_inputs == {"ref_log_probs", "entropies"}


def test_defaults():
    assert tc.methods.t_reg() == tc.Preference(
        link=logistic(0.1), pair_terms=(regularized(0.25, contrasted("better_log_probs", "worse_log_probs"), True),)
    )
