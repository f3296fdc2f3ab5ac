import math

import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_formula(seed, whiten):
    batch, current = naive.random_batch(seed)
    batch = naive.with_inputs(batch, {"step_values"}, seed)

    def formula(batch, log_probs):
        values, advantages = batch.extras["step_values"].tolist(), {}
        for r, tokens in enumerate(naive.rows_of(batch)):
            cuts = [k for k, t in enumerate(tokens) if not math.isnan(values[t])]
            ends = [*(values[tokens[k]] for k in cuts[1:]), batch.rewards[r].item()]
            credit = [0.0] * len(tokens)
            for begin, end, after in zip(cuts, [*cuts[1:], len(tokens)], ends, strict=False):
                credit[begin:end] = [after - values[tokens[begin]]] * (end - begin)
            advantages |= dict(zip(tokens, credit, strict=True))
        if whiten:
            mean = sum(advantages.values()) / len(advantages)
            var = sum((a - mean) ** 2 for a in advantages.values()) / (len(advantages) - 1)
            advantages = {t: (a - mean) / math.sqrt(var + 1e-8) for t, a in advantages.items()}
        ratio = lambda t: (log_probs[t] - batch.old_log_probs[t]).exp()  # noqa: E731
        losses = [[naive.clipped(advantages[t], ratio(t), 0.8, 1.2) for t in row] for row in naive.rows_of(batch)]
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.vineppo(whiten=whiten), batch, current, formula)


def test_kl_term_of_the_release():
    """1e-4 times the mean over rows of the sum over tokens of k3, at most 10; here a larger weight, to see it."""
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"step_values", "ref_log_probs"})
    batch.ref_log_probs[::5] += 3.0  # k3 of about 16

    def formula(batch, log_probs):
        rows = [row for row in naive.rows_of(batch) if row]
        u = {t: log_probs[t] - batch.ref_log_probs[t] for row in rows for t in row}
        k3 = {t: ((-x).exp() + x - 1).clamp(max=10) for t, x in u.items()}
        assert {x.item() == 10 for x in k3.values()} == {True, False}
        return sum(0.5 * k3[t] for row in rows for t in row) / len(rows)

    objective = tc.mix("vineppo", terms="kl(0.5, limit=10, aggregation=sequence_sum(1))")
    plain = tc.methods.vineppo()

    class Term:
        """The difference that the term makes."""

        @staticmethod
        def prepare(batch, progress):
            return objective.prepare(batch), plain.prepare(batch)

        @staticmethod
        def loss(prepared, log_probs):
            with_kl, without = objective.loss(prepared[0], log_probs), plain.loss(prepared[1], log_probs)
            return tc.Loss(with_kl.loss - without.loss, with_kl.metrics)

    out = naive.check(Term, batch, current, formula)
    torch.testing.assert_close(0.5 * out.metrics["kl"], out.loss.detach())


def test_by_hand():
    # Two steps: 0.5 -> 0.25 by the first two tokens, 0.25 -> 1 by the third; the tool's token has no advantage.
    batch = tc.Rollouts(
        torch.arange(4),
        torch.tensor([0, 4]),
        torch.tensor([0]),
        torch.tensor([1.0]),
        torch.tensor([True, True, False, True]),
        extras={"step_values": torch.tensor([0.5, math.nan, 0.9, 0.25])},
    )
    prepared = tc.methods.vineppo().prepare(batch)
    assert prepared.advantages.tolist() == [-0.25, -0.25, 0.0, 0.75]


def test_defaults():
    assert tc.methods.vineppo() == tc.Objective(
        credit=tc.credit.value_changes("step_values"), aggregation=tc.aggregation.token_mean()
    )
