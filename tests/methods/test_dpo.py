import dataclasses
import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.stages.link import logistic

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


CHOSEN, REJECTED = [-0.2, -1.0, -0.5], [-0.4, -2.0]
REFERENCE = [-0.3, -0.8, -0.7], [-0.3, -1.5]


def pair(scores=((0.0,) * 3, (0.0,) * 2)):
    """A chosen row of three tokens and a rejected one of two, with a prompt token before each; scores as entropies."""
    nan = math.nan
    return tc.Rollouts(
        torch.arange(7),
        torch.tensor([0, 4, 7]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([False, True, True, True, False, True, True]),
        ref_log_probs=torch.tensor([nan, *REFERENCE[0], nan, *REFERENCE[1]], dtype=torch.float64),
        entropies=torch.tensor([nan, *scores[0], nan, *scores[1]], dtype=torch.float64),
    )


def evaluated(objective, batch):
    log_probs = torch.tensor([0.0, *CHOSEN, 0.0, *REJECTED], dtype=torch.float64, requires_grad=True)
    out = objective.loss(objective.prepare(batch), log_probs)
    out.loss.backward()
    assert log_probs.grad[[0, 4]].tolist() == [0, 0]
    return out, log_probs.grad[[1, 2, 3, 5, 6]].tolist()


def test_by_hand():
    # Log-ratios 0.1 -0.2 0.2 and -0.1 -0.5: sums 0.1 and -0.6, so the margin is 0.7 and z = 0.1 * 0.7.
    out, grad = evaluated(tc.methods.dpo(), pair())
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-0.07)), abs=1e-12)
    slope = 0.1 / (1 + math.exp(0.07))
    assert grad == pytest.approx([-slope] * 3 + [slope] * 2, abs=1e-12)
    names = ("score_chosen_mean", "score_rejected_mean", "margin_mean", "accuracy_mean", "pairs", "tokens")
    assert [out.metrics[name].item() for name in names] == pytest.approx([0.1, -0.6, 0.7, 1, 1, 5])


@pytest.mark.parametrize(
    ("objective", "scores", "value", "chosen", "rejected"),
    [
        (tc.methods.dpo(), None, 0.6587595555487, [-0.048250714] * 3, [0.048250714] * 2),
        (tc.methods.dpo(label_smoothing=0.1), None, 0.6657595555, [-0.038250714] * 3, [0.038250714] * 2),
        # TGDPO's weights 1 + alpha r of chosen tokens and 1 - alpha r of rejected ones.
        (
            tc.methods.dpo(token_weights=(tc.token_weights.raised(tc.token_score.given("entropies"), 1.0),)),
            ([0.01, -0.02, 0.005], [0.01, 0.005]),
            0.6583012864,
            [-0.048709264, -0.047262454, -0.048468129],
            [0.048709264, 0.048468129],
        ),
        # cDPO's weights 1 - s of rejected tokens.
        (
            tc.methods.dpo(1.0, token_weights=(tc.token_weights.raised(tc.token_score.given("entropies"), -1.0),)),
            ([0.0, 0.0, 0.0], [0.866813332, 0.211941558]),
            0.4713091979,
            [-0.375815448] * 3,
            [0.050053607, 0.296164537],
        ),
        # The other settings of the objective: DPO of means, and SimPO.
        (tc.Preference(normalization="mean"), None, 0.6766193964, [-0.016388915] * 3, [0.024583372] * 2),
        (
            tc.Preference(reference=None, normalization="mean", link=logistic(2.5, margin=2.5 * 0.55)),
            None,
            0.5943960779,
            [-0.373420194] * 3,
            [0.560130291] * 2,
        ),
    ],
)
def test_golden_vectors(objective, scores, value, chosen, rejected):
    """Values of released code and of a float64 reference, to the digits they were written with."""
    out, grad = evaluated(objective, pair(scores) if scores else pair())
    assert out.loss.item() == pytest.approx(value, abs=6e-10 if scores else 6e-11)  # scores have nine digits
    assert grad == pytest.approx(chosen + rejected, abs=6e-10)


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
    out, grad = evaluated(tc.methods.dpo(), batch)
    assert out.loss.item() == pytest.approx(math.log(2)) and grad == [0] * 5
    means = tc.Preference(normalization="mean")
    assert evaluated(means, batch)[0].loss.item() == pytest.approx(math.log(2))


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
    )
