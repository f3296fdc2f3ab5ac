import dataclasses
import math
import re

import golden_pair
import naive
import pytest
import tokcredit as tc
import torch
from golden_pair import softplus, total
from tokcredit.methods.tab_po import barrier, differing, field_weights, unit_mean
from tokcredit.stages.link import logistic
from tokcredit.stages.token_score import given
from tokcredit.stages.token_weights import scored

EMPTY = torch.zeros((), dtype=torch.float64)


def naive_barrier(log_probs, weights, chosen, tau=0.6):
    gated = [t for t in chosen if log_probs[t] < math.log(tau)]
    mass = sum(weights[t] for t in gated)
    return sum((-weights[t] * log_probs[t] for t in gated), EMPTY) / max(1.0, mass)


@pytest.mark.parametrize("seed", range(2))
def test_formula(seed):
    """The second version of the paper: sums without weights."""
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs"})

    def formula(batch, log_probs):
        d = log_probs - batch.ref_log_probs

        def loss(chosen, rejected):
            preference = softplus(-0.7 * (total(d, chosen) - total(d, rejected)))
            return preference + 0.3 * naive_barrier(log_probs, dict.fromkeys(chosen, 1.0), chosen)

        return golden_pair.mean_of_pairs(batch, loss)

    naive.check(tc.methods.tab_po(0.7, 0.6, 0.3), batch, current, formula)


@pytest.mark.parametrize("seed", range(2))
def test_formula_of_the_first_version(seed):
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs", "field_weights"})

    def formula(batch, log_probs):
        def weights(own, other):
            w = {t: batch.extras["field_weights"][t].item() for t in own}
            for t, u in zip(own, other, strict=False):
                w[t] *= 1.2 if batch.tokens[t] != batch.tokens[u] else 1.0
            mean = sum(w.values()) / max(1, len(w))
            return {t: w[t] / mean for t in own}

        def score(w):
            return sum((w[t] * (log_probs[t] - batch.ref_log_probs[t]) for t in w), EMPTY) / max(1, len(w))

        def loss(chosen, rejected):
            w, v = weights(chosen, rejected), weights(rejected, chosen)
            return softplus(-0.7 * (score(w) - score(v))) + 0.3 * naive_barrier(log_probs, w, chosen)

        return golden_pair.mean_of_pairs(batch, loss)

    objective = tc.methods.tab_po(0.7, 0.6, 0.3, "v1")
    naive.check(objective, batch, current, formula)


def weighted_pair():
    """The second tokens differ; field weights 1 1.1 1.1 and 1 1.2."""
    batch = golden_pair.pair(field_weights=([1.0, 1.1, 1.1], [1.0, 1.2]))
    return dataclasses.replace(batch, tokens=torch.tensor([9, 1, 2, 3, 9, 1, 4]))


def test_by_hand():
    out = golden_pair.check(
        tc.methods.tab_po(),
        0.9083821554,
        [-0.206691211, -0.456691211, -0.456691211, 0.206691211, 0.206691211],
    )
    # The gate is open at -1 and -0.5: a mean of 0.75.
    assert out.metrics["barrier_mean"].item() == pytest.approx(0.75)
    assert out.metrics["margin_mean"].item() == pytest.approx(0.7)


def test_golden_vector_of_the_first_version():
    objective, batch = tc.methods.tab_po(variant="v1"), weighted_pair()
    gradient = [-0.066675244, -0.360738595, -0.300615496, 0.093454646, 0.134574690]
    out = golden_pair.check(objective, 0.9952775267, gradient, batch)
    assert out.metrics["barrier_mean"].item() == pytest.approx(0.7727272727)
    assert out.metrics["margin_mean"].item() == pytest.approx(0.3524398428)
    raw = differing(1.2)(batch, batch.rewards[:, None]) * batch.extras["field_weights"]
    assert raw[batch.response_mask].tolist() == pytest.approx([1, 1.32, 1.1, 1, 1.44])
    scaled = objective.token_weights[0](batch, batch.rewards[:, None])
    assert scaled[1:4].tolist() == pytest.approx([0.877193, 1.157895, 0.964912], abs=1e-6)


def test_weights_of_fields():
    """Tokens are words, single punctuation marks and blanks."""

    def weights(text):
        tokens = list(re.finditer(r"\w+|\W", text))
        found = field_weights(text, [x.span() for x in tokens])
        return [(x.group(), w) for x, w in zip(tokens, found, strict=True) if w != 1]

    chosen = '{"Code":"A","Sub-code":"B1","Span":"B1 ok"}'
    assert weights(chosen) == [("A", 1.1), ("B1", 1.2), ("B1", 1.2), (" ", 1.1), ("ok", 1.1)]
    rejected = chosen.replace('"Sub-code":"B1"', '"Sub-code":"B2"')
    assert weights(rejected) == [("A", 1.1), ("B2", 1.2), ("B1", 1.1), (" ", 1.1), ("ok", 1.1)]
    assert weights('{"Subcode": "x", "Code": ""}') == [("x", 1.2)]
    assert field_weights('{"Span":"aa","n":"aaa"}', [(9, 11), (18, 19), (19, 20), (20, 21), (30, 31)]) == [
        *[1.1] * 4,
        1.0,
    ]


def test_limit_cases():
    """Without a barrier v2 is DPO, and v1 with equal weights is DPO of means."""
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    ones = torch.where(batch.response_mask, 1.0, math.nan).double()
    batch = batch.with_inputs(field_weights=ones)
    v1 = tc.methods.tab_po(0.1, barrier_weight=0.0, variant="v1")
    v1 = dataclasses.replace(v1, token_weights=(unit_mean((scored(given("field_weights")), differing(1.0))),))
    assert unit_mean()(batch, torch.ones(12, 1)).eq(1).all()
    v2 = tc.methods.tab_po(0.1, barrier_weight=0.0)
    for ours, theirs in ((v1, tc.methods.sigmoid_norm()), (v2, tc.methods.dpo())):
        naive.check_same((ours, theirs), batch, current)


def test_gates_and_weights_at_their_limits():
    golden = 0.5333821554
    for tau, value in ((0.0, 0.0), (1e-9, 0.0), (2.0, 1.7 / 3), (0.66, 0.75), (0.5, 1.0)):
        out, _ = golden_pair.evaluated(tc.methods.tab_po(tau=tau))
        assert out.metrics["barrier_mean"].item() == pytest.approx(value)
        assert out.loss.item() == pytest.approx(golden + 0.5 * value, abs=1e-9)
    # All weights 0: every score and the barrier are 0. A gated mass below 1 is divided by 1.
    nothing = golden_pair.pair(field_weights=([0.0] * 3, [0.0] * 2))
    out, grad = golden_pair.evaluated(tc.methods.tab_po(variant="v1"), nothing)
    assert out.loss.item() == pytest.approx(math.log(2)) and grad == [0] * 5
    small = dataclasses.replace(tc.methods.tab_po(), token_weights=(scored(given("field_weights")),))
    out, _ = golden_pair.evaluated(small, golden_pair.pair(field_weights=([1.0, 0.25, 0.5], [1.0, 1.0])))
    assert out.metrics["barrier_mean"].item() == pytest.approx(0.25 * 1 + 0.5 * 0.5)


def test_pairs_in_any_order_have_the_same_weights():
    batch, _ = naive.random_pairs(3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(12, 1)
    for stage in (differing(1.5), unit_mean((differing(1.5),))):
        whole = stage(batch, ones).view(12, 7)[order]
        mask = batch.shaped(batch.response_mask)[order]
        assert torch.equal(stage(batch.select(order), ones).view(12, 7)[mask], whole[mask])
    with pytest.raises(ValueError, match="group_ids: expected pairs, groups of two rows, got groups of"):
        differing()(naive.random_batch()[0], ones)


def test_defaults():
    assert tc.methods.tab_po() == tc.Preference(link=logistic(0.5), pair_terms=(barrier(0.5, 0.66),))
    weights = unit_mean((scored(given("field_weights")), differing(1.2)))
    assert tc.methods.tab_po(variant="v1") == tc.Preference(
        (weights,), normalization="mean", link=logistic(0.5), pair_terms=(barrier(0.5, 0.66),)
    )
