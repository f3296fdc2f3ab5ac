import golden_pair
import naive
import pytest
import tokcredit as tc
from golden_pair import softplus, total
from tokcredit.methods.tgdpo import guided
from tokcredit.stages.link import logistic
from tokcredit.stages.token_score import log_ratio

ALIGNED = [-0.1, -1.2, -0.6], [-0.5, -1.6]


@pytest.mark.parametrize("f_min", [None, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_formula(seed, f_min):
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs", "aligned_log_probs"})

    def formula(batch, log_probs):
        reward = 0.3 * (batch.extras["aligned_log_probs"] - batch.ref_log_probs)
        d = log_probs - batch.ref_log_probs

        def weighted(positions, sign):
            f = {t: 1 + 0.8 * sign * reward[t].item() for t in positions}
            return {t: (f[t] if f_min is None else max(f[t], f_min)) * d[t] for t in positions}

        def loss(chosen, rejected):
            return softplus(-0.7 * (total(weighted(chosen, 1), chosen) - total(weighted(rejected, -1), rejected)))

        return golden_pair.mean_of_pairs(batch, loss)

    naive.check(tc.methods.tgdpo(0.7, 0.8, 0.3, f_min), batch, current, formula)


def test_by_hand():
    gradient = [-0.048709264, -0.047262454, -0.048468129, 0.048709264, 0.048468129]
    batch = golden_pair.pair(aligned_log_probs=ALIGNED)
    golden_pair.check(tc.methods.tgdpo(), 0.6583012864, gradient, batch)
    prepared = tc.methods.tgdpo().prepare(batch)
    assert prepared.advantages.tolist() == pytest.approx([0, 1.01, 0.98, 1.005, 0, -1.01, -1.005])


@pytest.mark.parametrize("case", ["alpha", "reference"])
def test_limit_cases(case):
    """Without guidance, or with the reference policy as the aligned one, it is DPO."""
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs", "aligned_log_probs"})
    if case == "reference":
        batch = batch.with_inputs(aligned_log_probs=batch.ref_log_probs.clone())
    naive.check_same((tc.methods.tgdpo(alpha=0.0 if case == "alpha" else 0.5), tc.methods.dpo()), batch, current)


def test_the_reward_has_the_beta_of_the_loss():
    assert tc.methods.tgdpo(0.3) == tc.methods.tgdpo(0.3, reward_beta=0.3) != tc.methods.tgdpo(0.3, reward_beta=0.1)


def test_defaults():
    reward = log_ratio("aligned_log_probs", "ref_log_probs", 0.1)
    assert tc.methods.tgdpo() == tc.Preference((guided(reward, 0.5, None),), link=logistic(0.1))
