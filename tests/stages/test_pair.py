"""Weights of pairs that depend on the policy before the update."""

import math

import golden_pair
import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.stages.pair import on_policy

SQUARED = [0.5, 0.4, 0.9], [0.7, 0.2]


def test_formula():
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs", "old_log_probs", "squared_probs"})

    def formula(batch, log_probs):
        d, rows, losses = log_probs - batch.ref_log_probs, naive.rows_of(batch), []
        old, squared = batch.input("old_log_probs"), batch.input("squared_probs")
        for own in naive.group_rows(batch):
            chosen, rejected = sorted(own, key=lambda r: -batch.rewards[r])
            z = golden_pair.total(d, rows[chosen]) - golden_pair.total(d, rows[rejected])
            means = [
                sum(float(old[t]) - math.log(float(squared[t])) for t in rows[r]) / max(len(rows[r]), 1)
                for r in (chosen, rejected)
            ]
            losses.append(math.exp(sum(means)) * golden_pair.softplus(-0.3 * z))
        return sum(losses) / len(losses)

    naive.check(tc.mix("dpo", link="logistic(0.3)", pair_weights="on_policy()"), batch, current, formula)


def test_by_hand():
    """The weight multiplies loss and gradient of the pair."""
    batch = golden_pair.pair(old_log_probs=(golden_pair.CHOSEN, golden_pair.REJECTED), squared_probs=SQUARED)
    logs = [[math.log(x) for x in row] for row in SQUARED]
    first = (-0.2 - 1.0 - 0.5 - sum(logs[0])) / 3
    second = (-0.4 - 2.0 - sum(logs[1])) / 2
    assert on_policy()(batch).item() == pytest.approx(math.exp(first + second))
    out, gradient = golden_pair.evaluated(tc.mix("dpo", pair_weights=on_policy()), batch)
    plain, expected = golden_pair.evaluated(tc.methods.dpo())
    assert out.loss.item() == pytest.approx(plain.loss.item() * math.exp(first + second))
    assert gradient == pytest.approx([x * math.exp(first + second) for x in expected])


def test_a_policy_that_is_uniform_has_weight_one():
    """log p is then that of the sum of squares at every token, also in an empty row."""
    edges, size = torch.tensor([0, 3, 3]), 5
    uniform = torch.full((3,), 1 / size, dtype=torch.float64)
    batch = tc.Rollouts(
        torch.arange(3),
        edges,
        torch.zeros(2, dtype=torch.long),
        torch.tensor([0.0, 1.0]),
        old_log_probs=uniform.log(),
        extras={"squared_probs": uniform},
    )
    assert on_policy()(batch).tolist() == pytest.approx([1.0])
