"""ReAGent: golden vectors, the algorithm one run and one token at a time, and its limits."""

import math

import pytest
import tokcredit as tc
import torch
import toy
from tokcredit.attribution.reagent import updated

IDS = torch.tensor([3, 1, 4, 1, 5, 9])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_golden_vectors():
    replaced = torch.tensor([[True, False, False, True]])
    score = updated(torch.zeros(1, 4, dtype=torch.float64), replaced, torch.tensor([0.3], dtype=torch.float64))
    s, p = 0.619039, torch.tensor([[0.387615, 0.112385, 0.112385, 0.387615]], dtype=torch.float64)
    torch.testing.assert_close(score, torch.tensor([[s, -s, -s, s]], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(score.softmax(-1), p, rtol=0, atol=1e-6)
    for certain in (1.0, -1.0):
        assert updated(torch.zeros(1, 4), replaced, torch.tensor([certain])).isfinite().all()


def test_distances():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    assert tc.attribution.distance(p, q).item() == pytest.approx(0.0311433743, abs=1e-7)
    assert tc.attribution.distance(p, q, root=True).item() == pytest.approx(0.1483970727, abs=1e-7)


@torch.no_grad()
def naive(model, ids, target, draws, ratio, kept, tolerance, max_steps, runs):
    """Each run by itself, with the random numbers that a batch of all runs draws: all runs take all steps."""

    def probs(row):
        return model(input_ids=torch.tensor([row])).logits[0, -1].softmax(-1).tolist()

    n, ids = len(ids), ids.tolist()
    before = probs(ids)[target]
    scores = torch.rand((runs, n), generator=draws, dtype=torch.float64).tolist()
    stopped, steps = [False] * runs, [0] * runs
    for _ in range(max_steps):
        active = [r for r in range(runs) if not stopped[r]]
        if not active:
            break
        replaced = (torch.rand((len(active), n), generator=draws) < ratio).tolist()
        first = torch.randint(20, (len(active), n), generator=draws).tolist()
        second = torch.randint(20, (len(active), n), generator=draws).tolist()
        for place, r in enumerate(active):
            row = [f if x else i for f, x, i in zip(first[place], replaced[place], ids, strict=True)]
            change = before - probs(row)[target]
            for i in range(n):
                d = change if replaced[place][i] else -change
                u = (d + 1) / 2
                scores[r][i] += math.log(u / (1 - u))
            best = sorted(range(n), key=lambda i: (-scores[r][i], i))[:kept]
            row = [i if t in best else s for t, (s, i) in enumerate(zip(second[place], ids, strict=True))]
            p = probs(row)
            stopped[r] = sum(x > p[target] for x in p) < tolerance
            steps[r] += 1
    return torch.tensor(scores, dtype=torch.float64).softmax(-1), stopped, steps


def test_against_loops():
    model, target = toy.causal(), 4
    settings = {"ratio": 0.4, "tolerance": 2, "max_steps": 4, "runs": 5}
    found = tc.attribution.reagent(
        model, IDS, target, tc.attribution.uniform(20), keep=0.3, generator=generator(3), **settings
    )
    runs, stopped, steps = naive(model, IDS, target, generator(3), kept=2, **settings)
    assert 0 < sum(stopped) < 5  # both cases
    torch.testing.assert_close(found.runs, runs)
    assert found.stopped.tolist() == stopped and found.steps.tolist() == steps
    torch.testing.assert_close(found.mean, runs[torch.tensor(stopped)].mean(0))
    assert found.mean.sum().item() == pytest.approx(1)


def test_limits():
    model, sample = toy.causal(), tc.attribution.uniform(20)
    # Everything is kept and every token is among the likeliest: each run stops at once.
    found = tc.attribution.reagent(model, IDS, 4, sample, keep=1.0, tolerance=20, generator=generator())
    assert found.stopped.all() and found.steps.tolist() == [1] * 8
    # Nothing that is sampled differs from the token itself: there is no information.
    same = lambda ids, replaced, generator: ids  # noqa: E731
    start = torch.rand((2, 6), generator=generator(1), dtype=torch.float64)
    found = tc.attribution.reagent(model, IDS, 4, same, runs=2, tolerance=20, generator=generator(1))
    torch.testing.assert_close(found.runs, start.softmax(-1))
    # No run stops: the mean is that of all.
    least = int(model(input_ids=IDS[None]).logits[0, -1].argmin())
    found = tc.attribution.reagent(model, IDS, least, same, keep=1.0, tolerance=1, max_steps=2, generator=generator(1))
    assert not found.stopped.any()
    torch.testing.assert_close(found.mean, found.runs.mean(0))
    single = tc.attribution.reagent(model, IDS[:1], 4, sample, max_steps=2, generator=generator())
    torch.testing.assert_close(single.mean, torch.ones(1, dtype=torch.float64))


def test_rationale():
    runs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.1, 0.4], [0.1, 0.2, 0.7]])
    found = tc.attribution.Importance(runs.mean(0), runs, torch.tensor([True, False, True]), torch.ones(3))
    assert found.rationale(1).tolist() == [0]
    assert found.rationale(2).tolist() == [0, 1, 2]
    assert found.rationale(2, overlap=3).tolist() == []
    assert found.rationale(9, overlap=3).tolist() == [0, 1, 2]


def test_the_token_that_decides_is_found():
    """The next token is a copy of the second one, whatever the others are."""

    class Copies(torch.nn.Module):
        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 20).double()
            logits[:, -1] = 3 * torch.nn.functional.one_hot(input_ids[:, 1], 20)
            return type("Output", (), {"logits": logits})

    found = tc.attribution.reagent(
        Copies(), IDS, 1, tc.attribution.uniform(20), keep=2, tolerance=1, generator=generator()
    )
    # The other tokens' scores fall whenever the second is replaced and they are not.
    assert (found.runs[:, 1] > 1 / 6).all() and found.mean.argmax() == 1


def test_samplers():
    replaced = torch.tensor([[True, False, True, True, False, True]])
    some = tc.attribution.uniform([7, 8])(IDS[None], replaced, generator())
    assert set(some[replaced].tolist()) <= {7, 8} and torch.equal(some[~replaced], IDS[None][~replaced])

    class Masked(torch.nn.Module):
        """After a mask token everything is as likely as the mask itself; elsewhere nothing is asked."""

        def forward(self, input_ids):
            assert torch.equal(input_ids == 11, replaced)
            logits = torch.full((*input_ids.shape, 20), -50.0)
            logits[..., 11], logits[..., 12] = 90.0, 0.0
            return type("Output", (), {"logits": logits})

    other = tc.attribution.from_masked_model(Masked(), 11)(IDS[None], replaced, generator())
    assert torch.equal(other, IDS[None].masked_fill(replaced, 12))
    for none in (0, []):
        with pytest.raises(ValueError, match="tokens: expected at least"):
            tc.attribution.uniform(none)


def test_faithfulness():
    model = toy.causal()
    ones = torch.ones(6)
    full = tc.attribution.faithfulness(model, IDS, ones, generator=generator())
    # All embeddings are kept for sufficiency, and all are dropped for comprehensiveness.
    assert full == pytest.approx((1.0, 1.0))
    none = tc.attribution.faithfulness(model, IDS, 0 * ones, root=True, generator=generator())
    assert none == pytest.approx((0.0, 0.0), abs=1e-7)
    for wrong in (ones * 2, ones * math.nan, ones[:3]):
        with pytest.raises(ValueError, match="importance: expected"):
            tc.attribution.faithfulness(model, IDS, wrong)


def test_refusals():
    model, sample = toy.causal(), tc.attribution.uniform(20)
    for wrong in (
        {"ratio": 0.0},
        {"ratio": 1.0},
        {"keep": 1.5},
        {"keep": 0.0},
        {"keep": -1},
        {"tolerance": 0},
        {"max_steps": 0},
        {"runs": 0},
        {"target": 20},
        {"ids": IDS.float()},
        {"ids": IDS[:0]},
        {"ids": IDS + 15},
        {"ids": -IDS},
    ):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))}: expected"):
            tc.attribution.reagent(**{"model": model, "ids": IDS, "target": 4, "sample": sample, **wrong})
