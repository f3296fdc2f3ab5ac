import math

import golden_pair
import naive
import pytest
import tokcredit as tc
import torch
from golden_pair import softplus, total
from tokcredit.methods.cdpo import contrastive_log_probs, critical
from tokcredit.stages.link import logistic

POSITIVE = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
NEGATIVE = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(2))
def test_formula(seed):
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs", "contrastive_log_probs"})

    def formula(batch, log_probs):
        d = log_probs - batch.ref_log_probs
        s = batch.extras["contrastive_log_probs"].exp().nan_to_num()

        def loss(chosen, rejected):
            return softplus(-0.7 * (total(d, chosen) - total((1 - s) * d, rejected)))

        return golden_pair.mean_of_pairs(batch, loss)

    naive.check(tc.methods.cdpo(0.7), batch, current, formula)


def test_by_hand():
    scores = contrastive_log_probs(POSITIVE, NEGATIVE, torch.tensor([0, 1]))
    assert scores.exp().tolist() == pytest.approx([0.866813332, 0.211941558])
    # Of chosen rows nothing is read.
    batch = golden_pair.pair(contrastive_log_probs=([float("nan")] * 3, scores.tolist()))
    golden_pair.check(tc.methods.cdpo(), 0.4713091979, [-0.375815448] * 3 + [0.050053607, 0.296164537], batch)


def test_golden_vector_of_the_released_code():
    scores = contrastive_log_probs(POSITIVE, NEGATIVE, torch.tensor([0, 1]))
    batch = golden_pair.pair(contrastive_log_probs=([float("nan")] * 3, scores.tolist()))
    gradient = [-0.016572235, -0.016504981, -0.016500006, 0.002207201, 0.013006889]
    golden_pair.check(tc.methods.cdpo(0.1, "released_code", 3), 0.6847290854, gradient, batch)
    # Places of prompt and padding add log 2 and shrink the gradient.
    value = (3 * 0.6847290854 + 2 * math.log(2)) / 5
    padded = [x * 3 / 5 for x in gradient]
    golden_pair.check(tc.methods.cdpo(0.1, "released_code", 5), value, padded, batch)


@pytest.mark.parametrize("seed", range(3))
def test_formula_of_the_released_code(seed):
    batch, current = naive.random_pairs(seed)
    batch = naive.with_inputs(batch, {"ref_log_probs", "contrastive_log_probs"})

    def formula(batch, log_probs):
        d = log_probs - batch.ref_log_probs
        s = batch.extras["contrastive_log_probs"].exp()
        zero = torch.zeros((), dtype=torch.float64)

        def loss(chosen, rejected):
            places = []
            for k in range(9):
                a = d[chosen[k]] if k < len(chosen) else zero
                b = (1 - s[rejected[k]]) * d[rejected[k]] if k < len(rejected) else zero
                places.append(softplus(-0.3 * (a - b)))
            return sum(places) / 9

        return golden_pair.mean_of_pairs(batch, loss)

    objective = tc.methods.cdpo(0.3, "released_code", 9)
    naive.check(objective, batch, current, formula)
    mask = batch.shaped(batch.response_mask)
    for t in mask.nonzero()[:5].tolist():
        x = current.masked_fill(~mask, math.nan).index_put(tuple(torch.tensor(t)), torch.tensor(math.nan).double())
        x.requires_grad_()
        out = objective.loss(objective.prepare(batch), x)
        out.loss.backward()
        assert out.loss.isnan() and x.grad[tuple(t)].isnan() and not x.grad[~mask].any()


def test_the_padded_length_is_that_of_the_released_code():
    for settings in ({"padded_length": 3}, {"variant": "released_code"}):
        with pytest.raises(ValueError, match=r"cdpo: padded_length: expected .* because of"):
            tc.methods.cdpo(**settings)


def test_a_padded_length_below_the_longest_response_is_refused():
    batch = golden_pair.pair(contrastive_log_probs=([-1.0] * 3, [-1.0] * 2))
    with pytest.raises(ValueError, match=r"padded_length: expected at least 3, .* got 2"):
        tc.methods.cdpo(variant="released_code", padded_length=2).prepare(batch)


def test_without_contrast_scores_are_those_of_the_first_model():
    tokens = torch.tensor([2, 0])
    found = contrastive_log_probs(POSITIVE, NEGATIVE, tokens, 0.0)
    torch.testing.assert_close(found, POSITIVE.log_softmax(1)[[0, 1], tokens])
    with pytest.raises(ValueError, match=r"negative: expected \[2, 3\], got \[2, 2\]"):
        contrastive_log_probs(POSITIVE, NEGATIVE[:, :2], tokens)
    for strength in (-1.0, math.nan):
        with pytest.raises(ValueError, match="strength: expected a number at least 0"):
            contrastive_log_probs(POSITIVE, NEGATIVE, tokens, strength)


def test_improbable_tokens_are_dpo():
    """With s = 0 every token is critical."""
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    batch = batch.with_inputs(contrastive_log_probs=torch.full((batch.num_tokens,), -float("inf")))
    naive.check_same((tc.methods.cdpo(0.3), tc.methods.dpo(0.3)), batch, current)


def test_defaults():
    assert tc.methods.cdpo() == tc.Preference((critical("contrastive_log_probs"),), link=logistic(1.0))
