import math

import naive
import pytest
import ragged
import tokcredit as tc
import torch

SPANS = ragged.packed(3, 2, mask=torch.tensor([True, False, True, True, True]))
EXPECTED = {
    "token": [0.3, -0.1, 0.2, 20.0],
    "sequence": [0.1, 0.1, 10.0, 10.0],
    "cumulative": [0.3, 0.2, 0.2, 10.0],
    "one": [0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("ratio", [tc.ratio.token(), tc.ratio.sequence(), tc.ratio.cumulative(), tc.ratio.one()])
def test_log_ratio_of_each_token(ratio):
    log_probs, old = torch.tensor([0.3, 9.0, -0.1, 0.2, 40.0]), torch.zeros(5)
    seen = ratio(SPANS, log_probs, old, torch.ones(2, 1)).per_token(SPANS, log_probs)[SPANS.mask].tolist()
    assert seen == pytest.approx(EXPECTED[type(ratio).__name__])
    assert ratio.couples_tokens == (type(ratio).__name__ in ("sequence", "cumulative"))


def test_bounds_of_the_log_ratio():
    log_probs, old = torch.tensor([0.3, 0.0, -0.1, 0.2, 40.0]), torch.zeros(5)
    for ratio, expected in (
        (tc.ratio.token(bound=0.25), [0.25, -0.1, 0.2, 0.25]),
        (tc.ratio.sequence(bound=0.25), [0.075, 0.075, 0.225, 0.225]),
        (tc.ratio.sequence(high=0.05), [0.05, 0.05, 0.05, 0.05]),
        (tc.ratio.sequence(over="sum"), [0.2, 0.2, 10.0, 10.0]),
        (tc.ratio.sequence(0.25, 0.3, over="sum"), [0.15, 0.15, 0.3, 0.3]),
        (tc.ratio.cumulative(bound=0.25, high=0.3), [0.25, 0.15, 0.2, 0.3]),
    ):
        seen = ratio(SPANS, log_probs, old, torch.ones(2, 1)).per_token(SPANS, log_probs)[SPANS.mask]
        assert seen.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["token", "sequence", "cumulative"])
def test_gradient_reaches_only_the_tokens_own_log_prob(name):
    """The stop-gradient form: d loss / d log p[t] is -A q[t], whatever q is made of."""
    batch, current = naive.random_batch()
    objective = tc.Objective(
        tc.credit.constant(),
        ratio=getattr(tc.ratio, name)(),
        clip=tc.clip.unclipped(),
        aggregation=tc.aggregation.token_sum(),
    )

    def formula(batch, log_probs):
        total = 0.0
        for tokens in naive.rows_of(batch):
            d = [(log_probs[t] - batch.old_log_probs[t]).item() for t in tokens]
            for k, t in enumerate(tokens):
                x = {"token": d[k], "sequence": sum(d) / len(d), "cumulative": sum(d[: k + 1])}[name]
                total = total - (x + log_probs[t] - log_probs[t].detach()).exp()
        return total

    naive.check(objective, batch, current, formula)


@pytest.mark.parametrize("name", ["token", "sequence", "cumulative"])
def test_a_ratio_names_its_reference(name):
    batch, current = naive.random_batch()
    engine = batch.old_log_probs + 0.2 * torch.randn(84, generator=ragged.generator(2), dtype=torch.float64)
    ratio = getattr(tc.ratio, name)
    to_engine = tc.Objective(ratio=ratio(to="rollout_log_probs"))
    to_old = tc.Objective(ratio=ratio())
    swapped = batch.with_inputs(old_log_probs=engine)
    both = batch.with_inputs(rollout_log_probs=engine)
    ours = to_engine.loss(to_engine.prepare(both), current).loss
    torch.testing.assert_close(ours, to_old.loss(to_old.prepare(swapped), current).loss, rtol=0, atol=0)
    assert ours != to_old.loss(to_old.prepare(both), current).loss
    with pytest.raises(ValueError, match="rollout_log_probs: expected in the batch because the objective reads it"):
        to_engine.prepare(batch)


@pytest.mark.parametrize("name", ["token", "sequence", "cumulative", "one"])
def test_without_old_log_probs_the_ratio_is_one(name):
    batch, current = naive.random_batch()
    batch = batch.with_inputs(old_log_probs=None)
    objective = tc.Objective(ratio=getattr(tc.ratio, name)(), aggregation=tc.aggregation.token_mean())
    log_probs = current.clone().requires_grad_()
    prepared = objective.prepare(batch)
    out = objective.loss(prepared, log_probs)
    out.loss.backward()
    assert out.metrics["ratio_mean"] == 1
    expected = -prepared.advantages.double() / int(batch.lengths.sum())
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-6, atol=1e-12)
    assert log_probs.grad.any()


def test_nan_at_a_masked_token_reaches_nothing():
    log_probs = torch.tensor([0.3, math.nan, -0.1, 0.2, 0.5])
    for ratio in (tc.ratio.sequence(), tc.ratio.cumulative()):
        seen = ratio(SPANS, log_probs, torch.zeros(5), torch.ones(2, 1)).per_token(SPANS, log_probs)
        assert seen[SPANS.mask].isfinite().all()
