import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.supervised import reverse_kl

SCORE = tc.token_score


def scaled(x):
    low, high = min(x, default=0), max(x, default=0)
    return [(a - low) / (high - low) if high > low else 0.0 for a in x]


def quantile(x, q):
    x, place = sorted(x), q * (len(x) - 1)
    below = math.floor(place)
    return x[below] + (x[min(below + 1, len(x) - 1)] - x[below]) * (place - below)


def chosen(batch, score, share=0.5):
    """Per row the largest floor(share m) tokens, at least one; ``score(entropies, reverse, forward)`` of a row."""
    rows = naive.rows_of(batch)
    ceiling = quantile([batch.entropies[t].item() for ts in rows for t in ts], 0.98)
    kept = []
    for ts in rows:
        h = [min(batch.entropies[t].item(), ceiling) for t in ts]
        s = score(scaled(h), *([batch.extras[n][t].item() for t in ts] for n in ("reverse_kl", "forward_kl")))
        best = sorted(range(len(ts)), key=lambda i, s=s: (-s[i], i))[: max(1, math.floor(share * len(ts)))]
        kept += [ts[i] for i in best]
    return kept


def soft_or(h, d, _):
    return [1 - (1 - a) * (1 - b) for a, b in zip(h, scaled(d), strict=True)]


def q3(h, _, f):
    return [b * (1 - a) for a, b in zip(h, f, strict=True)]


Q3 = SCORE.but_not(SCORE.given("forward_kl"), SCORE.scaled(SCORE.given("entropies"), 0.98))


@pytest.mark.parametrize(("rank", "score"), [(None, soft_or), (Q3, q3)])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_formula(rank, score, share):
    """Through the divergence itself, down to the student's logits."""
    g = torch.Generator().manual_seed(0)
    batch = naive.random_batch()[0]
    student, teacher = (2 * torch.randn(12, 7, 5, generator=g, dtype=torch.float64) for _ in range(2))
    batch = naive.with_inputs(batch, {"entropies"})
    with torch.no_grad():
        batch.extras["reverse_kl"] = tc.divergence.kl(student, teacher)
        batch.extras["forward_kl"] = tc.divergence.kl(teacher, student)
    batch.extras.update({n: x.reshape(-1) for n, x in batch.extras.items()})
    objective = tc.methods.tip(share, rank=rank)
    ours = student.clone().requires_grad_()
    out = objective.loss(objective.prepare(batch), tc.divergence.kl(ours, teacher))
    out.loss.backward()
    theirs = student.clone().requires_grad_()
    p, log_q = theirs.softmax(-1), teacher.log_softmax(-1)
    each = (p * (theirs.log_softmax(-1) - log_q)).sum(-1).reshape(-1)
    expected = each[chosen(batch, score, share)].mean()
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9)
    assert ours.grad.abs().sum() > 0.1


def one_row(entropies, divergences):
    n = len(entropies)
    return tc.Rollouts(
        torch.arange(n),
        torch.tensor([0, n]),
        torch.tensor([0]),
        torch.tensor([0.0]),
        entropies=torch.tensor(entropies, dtype=torch.float64),
        extras={"reverse_kl": torch.tensor(divergences, dtype=torch.float64)},
    )


def test_by_hand():
    batch = one_row([0.1, 0.5, 0.9, 0.2], [0.8, 0.1, 0.4, 0.0])
    score = SCORE.either(SCORE.scaled(SCORE.given("entropies")), SCORE.scaled(SCORE.given("reverse_kl")))
    assert score(batch).tolist() == pytest.approx([1, 0.5625, 1, 0.125])
    objective = tc.methods.tip(quantile=1.0)
    prepared = objective.prepare(batch)
    assert prepared.mask.tolist() == [True, False, True, False]
    divergences = batch.extras["reverse_kl"].clone().requires_grad_()
    out = objective.loss(prepared, divergences)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.6)
    assert divergences.grad.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_equal_numbers_scale_to_zero_and_short_rows_keep_a_token():
    batch = one_row([0.5, 0.5, 0.5], [0.3, 0.3, 0.3])
    assert tc.methods.tip(share=0.1).prepare(batch).mask.tolist() == [True, False, False]
    assert not SCORE.scaled(SCORE.given("entropies"))(batch).any()


def test_drawn_in_proportion():
    torch.manual_seed(0)
    batch = one_row([0.0, 0.2, 0.3, 0.5] * 500, [0.0] * 2000)
    stage = tc.methods.tip(share=0.01, rank=SCORE.given("entropies"), drawn=True)
    counts = sum(stage.prepare(batch).mask.view(500, 4).sum(0) for _ in range(100))
    assert counts.sum() == 2000 and counts[0] == 0
    torch.testing.assert_close(counts / 2000, torch.tensor([0.0, 0.2, 0.3, 0.5]), rtol=0, atol=0.05)


def test_exact_ties_go_to_the_first_token():
    """``a + b - a * b`` gives 1 - 2**-53 or 1 where a or b is 1, so that another token than the first is kept."""
    g = torch.Generator().manual_seed(0)
    inexact = 0
    for _ in range(50):
        entropies, divergences = (torch.rand(8, generator=g, dtype=torch.float32).double() for _ in range(2))
        entropies[2], divergences[5] = 2.0, 3.0  # the largest of each: scores of exactly 1
        batch = one_row(entropies.tolist(), divergences.tolist())
        kept = tc.methods.tip(share=0.2, quantile=1.0).prepare(batch).mask
        assert kept.tolist() == [t == 2 for t in range(8)]
        a, b = (torch.tensor(scaled(x.tolist()), dtype=torch.float64) for x in (entropies, divergences))
        inexact += int((a + b - a * b).argmax() != 2)
    assert inexact > 0, "the other form would have been wrong"


def test_terms_on_log_probs_are_refused():
    with pytest.raises(TypeError, match="terms: expected one of token_loss, filters, token_weights, scales, aggr"):
        tc.mix("tip", terms="kl(0.1)")


def test_defaults():
    assert tc.methods.tip() == tc.Supervised(
        reverse_kl(),
        filters=(
            tc.filters.top_share(
                0.5,
                SCORE.either(
                    SCORE.scaled(SCORE.given("entropies"), quantile=0.98),
                    SCORE.scaled(SCORE.given("reverse_kl"), quantile=None),
                ),
                per_row=True,
                round_up=False,
            ),
        ),
        aggregation=tc.aggregation.token_mean(),
    )
