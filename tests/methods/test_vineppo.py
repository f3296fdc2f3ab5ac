import math

import naive
import pytest
import tokcredit as tc
import torch


@pytest.mark.parametrize("seed", range(3))
def test_formula(seed):
    batch, current = naive.random_batch(seed)
    batch = naive.with_inputs(batch, {"step_values"}, seed)

    def formula(batch, log_probs):
        values, losses = batch.extras["step_values"].tolist(), []
        for r, tokens in enumerate(naive.rows_of(batch)):
            cuts = [k for k, t in enumerate(tokens) if not math.isnan(values[t])]
            ends = [*(values[tokens[k]] for k in cuts[1:]), batch.rewards[r].item()]
            paid = [0.0] * len(tokens)
            for begin, end, after in zip(cuts, [*cuts[1:], len(tokens)], ends, strict=False):
                paid[begin:end] = [after - values[tokens[begin]]] * (end - begin)
            ratios = [(log_probs[t] - batch.old_log_probs[t]).exp() for t in tokens]
            losses.append([naive.clipped(a, q, 0.8, 1.2) for a, q in zip(paid, ratios, strict=True)])
        return naive.token_mean(batch, losses)

    naive.check(tc.methods.vineppo(), batch, current, formula)


def test_by_hand():
    # Two steps: 0.5 -> 0.25 by the first two tokens, 0.25 -> 1 by the third; the tool's token is not paid.
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
