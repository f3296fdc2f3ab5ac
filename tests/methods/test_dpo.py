import dataclasses
import math

import golden_pair
import naive
import pytest
import tokcredit as tc
import torch
from golden_pair import CHOSEN, REFERENCE, REJECTED, pair, softplus, total
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import f_divergence, length_desensitized

WEIGHTED = (tc.token_weights.raised(tc.token_score.given("entropies"), 0.5),)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(), WEIGHTED])
def test_formula(seed, smoothing, weights):
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs", "entropies"})

    def formula(batch, log_probs):
        rows, losses = naive.rows_of(batch), []

        def score(row):
            weight = [1 + 0.5 * batch.entropies[t] if weights else 1.0 for t in rows[row]]
            return sum(
                (w * (log_probs[t] - batch.ref_log_probs[t]) for w, t in zip(weight, rows[row], strict=True)), 0.0
            )

        for a, b in naive.group_rows(batch):
            chosen, rejected = (a, b) if batch.rewards[a] > batch.rewards[b] else (b, a)
            z = 0.7 * (score(chosen) - score(rejected))
            losses.append((1 - smoothing) * (1 + (-z).exp()).log() + smoothing * (1 + z.exp()).log())
        return sum(losses) / len(losses)

    naive.check(tc.methods.dpo(0.7, smoothing, weights), batch, current, formula)


def test_by_hand():
    # Log-ratios 0.1 -0.2 0.2 and -0.1 -0.5: sums 0.1 and -0.6, so the margin is 0.7 and z = 0.1 * 0.7.
    out, grad = golden_pair.evaluated(tc.methods.dpo())
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-0.07)), abs=1e-12)
    slope = 0.1 / (1 + math.exp(0.07))
    assert grad == pytest.approx([-slope] * 3 + [slope] * 2, abs=1e-12)
    names = ("score_chosen_mean", "score_rejected_mean", "margin_mean", "accuracy_mean", "pairs", "tokens")
    assert [out.metrics[name].item() for name in names] == pytest.approx([0.1, -0.6, 0.7, 1, 1, 5])


@pytest.mark.parametrize(
    ("objective", "value", "chosen", "rejected"),
    [
        (tc.methods.dpo(), 0.6587595555487, -0.048250714, 0.048250714),
        (tc.methods.dpo(label_smoothing=0.1), 0.6657595555, -0.038250714, 0.038250714),
        (tc.methods.dpo(transform=f_divergence("forward_kl")), 0.6483344993, -0.043168348, 0.086930378),
        (tc.methods.dpo(transform=f_divergence("js")), 0.6736857546, -0.023284284, 0.031648392),
        (tc.methods.dpo(transform=f_divergence("alpha")), 0.6540785588, -0.045666535, 0.064803898),
        (tc.methods.dpo(transform=f_divergence("alpha", 1 + 1e-7)), 0.6587595555487, -0.048250714, 0.048250714),
    ],
)
def test_golden_vectors(objective, value, chosen, rejected):
    """Values of released code and of a float64 reference."""
    golden_pair.check(objective, value, [chosen] * 3 + [rejected] * 2, tolerance=6e-11)


def test_golden_vector_of_length_desensitized_weights():
    """Of the longer response the third token has a weight of 0.5; the reference policy's too."""
    objective = tc.methods.dpo(token_weights=(length_desensitized(0.5),))
    gradient = [-0.04850045, -0.04850045, -0.024250225, 0.04850045, 0.04850045]
    golden_pair.check(objective, 0.6635971131, gradient)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_f_divergences(divergence):
    batch, current = naive.random_pairs(1)
    batch = naive.with_inputs(batch, {"ref_log_probs"})

    def formula(batch, log_probs):
        d = log_probs - batch.ref_log_probs
        f = {
            "forward_kl": lambda s: 1 - (-s).exp(),
            "js": lambda s: math.log(2) - softplus(-s),
            "alpha": lambda s: ((0.3 - 1) * s).exp().sub(1) / (0.3 - 1),
        }[divergence]

        def loss(chosen, rejected):
            return softplus(-0.7 * (f(total(d, chosen)) - f(total(d, rejected))))

        return golden_pair.mean_of_pairs(batch, loss)

    naive.check(tc.methods.dpo(0.7, transform=f_divergence(divergence, 0.3)), batch, current, formula)


def test_large_and_undefined_scores_of_f_divergences():
    """Exponents stop at 80, and a NaN keeps its gradient."""
    x = torch.tensor([-1000.0, math.nan, 0.0], dtype=torch.float64, requires_grad=True)
    y = f_divergence("forward_kl")(x)
    y.sum().backward()
    assert y[0].item() == pytest.approx(-math.exp(80)) and y[2] == 0
    assert x.grad[0] == 0 and x.grad[1].isnan() and x.grad[2] == 1


@pytest.mark.parametrize("seed", range(2))
def test_limit_cases(seed):
    """Weights of 1 are plain DPO, and swapped labels are full smoothing."""
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs", "entropies"})

    def of(objective, batch=batch):
        log_probs = current.clone().requires_grad_()
        out = objective.loss(objective.prepare(batch), log_probs)
        out.loss.backward()
        return out.loss.detach(), log_probs.grad

    plain = of(tc.methods.dpo(0.3))
    ones = tc.token_weights.raised(tc.token_score.given("entropies"), 0.0)
    for x, y in zip(plain, of(tc.methods.dpo(0.3, token_weights=(ones,))), strict=True):
        torch.testing.assert_close(x, y)
    assert not torch.allclose(plain[1], of(tc.methods.dpo(0.3, token_weights=WEIGHTED))[1])
    swapped = of(tc.methods.dpo(0.3), dataclasses.replace(batch, rewards=-batch.rewards))
    smoothed = of(tc.methods.dpo(0.3, label_smoothing=0.25))
    for p, s, x in zip(plain, swapped, smoothed, strict=True):
        torch.testing.assert_close(x, 0.75 * p + 0.25 * s)


def test_empty_responses_have_a_score_of_0():
    batch = dataclasses.replace(pair(), response_mask=torch.zeros(7, dtype=torch.bool))
    out, grad = golden_pair.evaluated(tc.methods.dpo(), batch)
    assert out.loss.item() == pytest.approx(math.log(2)) and grad == [0] * 5
    means = tc.Preference(normalization="mean")
    assert golden_pair.evaluated(means, batch)[0].loss.item() == pytest.approx(math.log(2))


def test_pairs_are_checked():
    batch = dataclasses.replace(pair(), rewards=torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="rewards: expected a higher reward for the chosen row of each pair"):
        tc.methods.dpo().prepare(batch)
    with pytest.raises(ValueError, match="group_ids: expected pairs, groups of two rows, got a group of 1"):
        tc.methods.dpo().prepare(dataclasses.replace(pair(), group_ids=torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="rows: expected both rows of each pair once"):
        tc.methods.dpo().prepare(pair()).select([0])
    with pytest.raises(ValueError, match="ref_log_probs: expected in the batch"):
        tc.methods.dpo().prepare(dataclasses.replace(pair(), ref_log_probs=None))


def test_pairs_from_padded_tensors():
    """The same pair as two padded tensors: chosen and rejected rows of one width."""
    mask = torch.tensor([[False, True, True, True]]), torch.tensor([[False, True, True, False]])
    reference = torch.tensor([[0.0, *REFERENCE[0]]]), torch.tensor([[0.0, *REFERENCE[1], 0.0]])
    batch = tc.Rollouts.from_pairs(
        torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long), *mask, ref_log_probs=reference
    )
    log_probs = torch.tensor([[0.0, *CHOSEN], [0.0, *REJECTED, 0.0]], requires_grad=True)
    objective = tc.methods.dpo()
    out = objective.loss(objective.prepare(batch), log_probs)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.65875955, abs=1e-6)
    slope = 0.048250714
    expected = [0, -slope, -slope, -slope, 0, slope, slope, 0]
    assert log_probs.grad.view(-1).tolist() == pytest.approx(expected, abs=1e-7)


def test_defaults():
    assert tc.methods.dpo() == tc.Preference(
        token_weights=(),
        reference="ref_log_probs",
        normalization="sum",
        link=logistic(beta=0.1, margin=0.0, label_smoothing=0.0),
        transform=None,
    )
