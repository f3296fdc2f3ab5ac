import dataclasses
import math

import naive
import pytest
import ragged
import tokcredit as tc
import torch
from tokcredit.methods.hapo import outside_center, widened
from tokcredit.stages.base import number
from tokcredit.stages.clip import Window
from tokcredit.stages.scale import Scale

H = tc.token_score.given("entropies")


def factors(scale, log_ratio, window, signal):
    n = log_ratio.numel()
    return scale(torch.zeros(n), log_ratio, torch.ones(n), tc.Spans.single(n), window, signal)


def test_middle_half_of_the_window():
    """Ratios just inside and outside of 0.9 and 1.14, the middle of [0.8, 1.28]; h = 0.5, then -0.5."""
    log_ratio = torch.tensor([0.899, 0.901, 1.0, 1.139, 1.141]).log()
    window = Window("clip", math.log(0.8), math.log(1.28))
    scale = outside_center(H, strength=0.8)
    uncertain = factors(scale, log_ratio, window, torch.full((5,), 0.5))
    certain = factors(scale, log_ratio, window, torch.full((5,), -0.5))
    assert uncertain.tolist() == pytest.approx([1.4, 1, 1, 1, 1.4])
    assert certain.tolist() == pytest.approx([1, 0.6, 0.6, 0.6, 1])


def test_bounds_may_differ_between_tokens():
    window = Window("clip", -0.1, 0.1, power=2.0).per_token(tc.Spans.single(2))
    assert factors(outside_center(H), torch.tensor([0.08, 0.08]), window, torch.ones(2)).tolist() == [2.0, 1.0]
    open_below = Window("clip", -math.inf, torch.tensor([0.1, 0.1]))
    ours = factors(outside_center(H), torch.tensor([-0.6, -0.8]), open_below, torch.ones(2))
    assert ours.tolist() == [1.0, 2.0]  # half of the way to a ratio of 0


def test_reads_the_score_that_widened_the_window():
    """Computed once where both stages have it; another score is computed on its own."""
    batch, _ = naive.random_batch(entropies=torch.rand(12, 7))
    scale = outside_center(H, strength=0.8)
    shared = widened(H)(batch, batch.rewards[:, None])
    plain = tc.clip.ppo()(batch, batch.rewards[:, None])
    assert scale.signal(batch, shared) is shared.score
    assert torch.equal(scale.signal(batch, plain), batch.entropies)
    chosen = batch.selection(torch.tensor([3]))
    assert torch.equal(shared.part(chosen).score, batch.entropies[21:28])
    assert torch.equal(shared.part(chosen).low, shared.low[21:28])


def test_several_scales_multiply_and_see_what_they_are_promised():
    batch, current = naive.random_batch()

    @dataclasses.dataclass(frozen=True)
    class seen(Scale):
        factor: float = number()

        def __call__(self, log_probs, log_ratio, advantages, spans, window, signal):
            assert not log_probs.requires_grad and not log_ratio.requires_grad
            torch.testing.assert_close(log_ratio, log_probs - batch.old_log_probs)
            assert advantages.shape == (12, 1) and spans.size == 84 and window.surrogate == "clip" and signal is None
            return torch.where(log_probs < -0.5, self.factor, 1.0)

    objective = tc.mix("dapo", filters=(), scales=(seen(0.5), seen(3.0)))

    def formula(batch, log_probs):
        advantages, old, losses = naive.group_advantages(batch), batch.old_log_probs, []
        for a, tokens in zip(advantages, naive.rows_of(batch), strict=True):
            of_token = [a * (1.5 if log_probs[t].item() < -0.5 else 1.0) for t in tokens]
            q = [(log_probs[t] - old[t]).exp() for t in tokens]
            losses.append([naive.clipped(x, y, 0.8, 1.28) for x, y in zip(of_token, q, strict=True)])
        return naive.token_mean(batch, losses)

    naive.check(objective, batch, current, formula)


def test_a_scale_per_row():
    batch, current = naive.random_batch()

    @dataclasses.dataclass(frozen=True)
    class by_row(Scale):
        def __call__(self, log_probs, log_ratio, advantages, spans, window, signal):
            return tc.segment.mean(log_ratio, spans).exp()[:, None]

    objective = tc.Objective(scales=(by_row(),), clip=tc.clip.unclipped(), aggregation=tc.aggregation.token_sum())

    def formula(batch, log_probs):
        total = 0.0
        for a, tokens in zip(naive.group_advantages(batch), naive.rows_of(batch), strict=True):
            d = [log_probs[t] - batch.old_log_probs[t] for t in tokens]
            factor = math.exp(sum(x.item() for x in d) / max(len(d), 1))
            total = total - sum(a * factor * x.exp() for x in d)
        return total

    naive.check(objective, batch, current, formula)


def test_scales_see_rows_of_a_micro_batch_as_in_the_whole():
    batch, current = naive.random_batch()
    engine = batch.old_log_probs + 0.2 * torch.randn(84, generator=ragged.generator(2), dtype=torch.float64)
    objective = tc.Objective(scales=(tc.scale.within("ratio", "mean", 0.95, 1.1, to="rollout_log_probs"),))
    prepared = objective.prepare(batch.with_inputs(rollout_log_probs=engine))
    whole = objective.loss(prepared, current).loss
    pieces = [[4, 0, 2], [11, 1], [3, 5, 6, 7, 8, 9, 10]]
    parts = [objective.loss(prepared.select(rows), current[rows]).loss for rows in pieces]
    torch.testing.assert_close(sum(parts), whole)
    assert whole != tc.Objective().loss(tc.Objective().prepare(batch), current).loss
