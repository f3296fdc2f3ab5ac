import dataclasses
import math

import naive
import ragged
import tokcredit as tc
import torch
from tokcredit.stages.base import number
from tokcredit.stages.scale import Scale


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


def test_teacher_log_ratio():
    """The loss on sampled tokens has the gradient of sg(log p - log q) * log p, truncated ratios times it."""
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"teacher_log_probs"})

    def formula(batch, log_probs):
        teacher, old = batch.input("teacher_log_probs"), batch.old_log_probs
        rows = []
        for tokens in naive.rows_of(batch):
            gaps = [(log_probs[t] - teacher[t]).item() for t in tokens]
            ratios = [min(math.exp((log_probs[t] - old[t]).item()), 1.5) for t in tokens]
            rows.append([g * r * log_probs[t] for g, r, t in zip(gaps, ratios, tokens, strict=True)])
        return naive.token_mean(batch, rows)

    naive.check(tc.mix("sft", scales=("teacher_log_ratio()", "truncated_ratio(1.5)")), batch, current, formula)


def test_a_teacher_that_agrees_has_no_gradient():
    batch, current = naive.random_batch()
    same = batch.with_inputs(teacher_log_probs=current.detach().clone())
    objective = tc.mix("sft", scales="teacher_log_ratio()")
    log_probs = current.detach().clone().requires_grad_()
    objective.loss(objective.prepare(same), log_probs).loss.backward()
    assert log_probs.grad.abs().max() == 0
