import naive
import pytest
import tokcredit as tc
from tokcredit.methods.kl_cov import top_covariance


def test_formula():
    def formula(batch, log_probs):
        advantages = naive.group_advantages(batch)
        tokens = [(r, t) for r, row in enumerate(naive.rows_of(batch)) for t in row]
        mean_advantage = sum(advantages[r] for r, _ in tokens) / len(tokens)
        old = batch.old_log_probs.tolist()
        mean = sum(old[t] for _, t in tokens) / len(tokens)
        cov = {t: (advantages[r] - mean_advantage) * (old[t] - mean) for r, t in tokens}
        chosen = sorted(cov, key=lambda t: -cov[t])[: int(0.1 * len(tokens))]
        assert len(chosen) == 6
        losses = []
        for r, row in enumerate(naive.rows_of(batch)):
            x = [log_probs[t] - old[t] for t in row]
            losses.append(
                [-advantages[r] * y.exp() + 0.7 * y.abs() * (t in chosen) for y, t in zip(x, row, strict=True)]
            )
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.kl_cov(0.7, 0.1), *naive.random_batch(), formula)


def test_by_hand():
    # The token with the largest covariance, 1.92, is the second of the second row: 0.2 from the loss, -1 from the pull.
    found = naive.slopes(tc.methods.kl_cov())
    assert found == pytest.approx([-1.1, -5, -0.777778, -1, 0.6, 0.2 - 1, 1.077778], abs=1e-6)


def test_defaults():
    assert tc.methods.kl_cov() == tc.Objective(
        clip=tc.clip.unclipped(),
        aggregation=tc.aggregation.token_mean(),
        terms=(tc.term.kl(1.0, "abs", to="old_log_probs", where=top_covariance(2e-3), over_all=True),),
    )
