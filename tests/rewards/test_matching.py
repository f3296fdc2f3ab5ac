import functools
import itertools
import sys

import numpy as np
import pytest
import tokcredit as tc
import torch
from tokcredit.rewards import matching
from tokcredit.rewards.matching import Call

S = np.array([[0.9, 0.8], [0.85, 0.1]])


@pytest.mark.parametrize(
    ("call", "reference", "expected"),
    [
        (Call("f", {}), Call("f", {}), 1.0),
        (Call("f", {"a": 1}), Call("g", {"a": 1}), 0.0),
        (Call("f", {"a": 1, "b": 2}), Call("f", {"a": 1, "b": 2}), 1.0),
        (Call("f", {"a": 1, "b": 3}), Call("f", {"a": 1, "b": 2}), (1 + 1 + 1) / 4),
        (Call("f", {"a": 1, "c": 2}), Call("f", {"a": 1, "b": 2}), (1 + 1 / 3 + 1) / 4),
        (Call("f", {"a": 1}), Call("f", {}), 1 / 2),
        (Call("f", {}), Call("f", {"a": 1}), 1 / 3),
        (Call("f", None), Call("f", {}), 0.0),
        (Call("F", {}), Call("f", {}), 0.0),
    ],
)
def test_similarity(call, reference, expected):
    assert matching.similarity(call, reference) == pytest.approx(expected)


def test_case_of_names():
    assert matching.similarity(Call("F", {}), Call("f", {}), ignore_case=True) == 1.0


def test_by_hand():
    pytest.importorskip("scipy")
    assert matching.optimal(S).tolist() == [0.8, 0.85]
    assert matching.greedy(S).tolist() == [0.9, 0.1]
    assert matching.sinkhorn(S).tolist() == pytest.approx([0.401866, 0.411002], abs=1e-6)


def test_optimal_is_the_best_of_all():
    pytest.importorskip("scipy")
    g = np.random.default_rng(0)
    for m, n in itertools.product(range(1, 5), repeat=2):
        s = g.random((m, n)) * (g.random((m, n)) < 0.7)
        options = itertools.permutations(range(max(m, n)), m)
        best = max(sum(s[i, j] for i, j in enumerate(p) if j < n) for p in options)
        assert matching.optimal(s).sum() == pytest.approx(best)
        assert matching.greedy(s).sum() <= best + 1e-12
        charged = matching.optimal(s, penalty=0.5)
        assert ((charged > 0) | (charged == -0.5)).all()


@pytest.mark.parametrize(("m", "n"), [(3, 2), (1, 4), (4, 4)])
def test_sinkhorn_keeps_its_margins(m, n):
    """With all similarities 1 a reward is the row's mass; else the plan is the one that no rescaling improves."""
    assert matching.sinkhorn(np.ones((m, n))).tolist() == pytest.approx([1 / m] * m)
    s = np.random.default_rng(m).random((m, n))
    kernel, columns = np.exp(s / 0.2), np.ones(n)
    for _ in range(5000):
        rows = (1 / m) / (kernel @ columns)
        columns = (1 / n) / (kernel.T @ rows)
    plan = rows[:, None] * kernel * columns
    assert matching.sinkhorn(s, 0.2).tolist() == pytest.approx((plan * s).sum(1).tolist(), abs=1e-9)


def test_nothing_to_match():
    for rule in (matching.greedy, functools.partial(matching.sinkhorn, regularization=0.1)):
        assert rule(np.zeros((0, 3))).tolist() == []
        assert rule(np.zeros((2, 0))).tolist() == [0.0, 0.0]
    assert matching.greedy(np.zeros((2, 0)), penalty=1.0).tolist() == [-1.0, -1.0]
    pytest.importorskip("scipy")
    assert matching.optimal(np.zeros((2, 0)), penalty=1.0).tolist() == [-1.0, -1.0]


def test_rewards_of_turns_are_means_over_their_calls():
    right, wrong = Call("f", {"x": 1}), Call("g", {})
    turns = [[right, wrong], [], 0.25, [Call("h", {})]]
    references = [Call("f", {"x": 1}), Call("h", {})]
    assert matching.rewards(turns, references, matching.greedy) == [0.5, 0.0, 0.25, 1.0]
    charged = functools.partial(matching.greedy, penalty=1.0)
    assert matching.rewards(turns, references, charged) == [0.0, 0.0, 0.25, 1.0]


def test_rewards_stand_at_the_last_token_of_each_turn():
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    tokens, groups = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    batch = tc.Rollouts.from_padded(tokens, mask, groups, torch.zeros(3))
    placed = matching.turn_rewards(batch, [[0.5, 1.0], [2.0], []]).view(3, 5)
    assert placed.tolist() == [[0, 0.5, 0, 1, 0], [0, 0, 0, 2, 0], [0] * 5]
    with pytest.raises(ValueError, match="rewards: expected 2 numbers for the turns of row 0, got 1"):
        matching.turn_rewards(batch, [[0.5], [2.0], []])
    with pytest.raises(ValueError, match="rewards: expected one list for each of 3 rows, got 1"):
        matching.turn_rewards(batch, [[0.5]])


def test_texts_and_options():
    assert matching.f1("The answer: Paris!", "paris") == pytest.approx(2 * 1 / 4)
    assert matching.f1("paris", "rome") == matching.f1("", "rome") == 0.0
    assert matching.options({"A", "C"}, {"A", "C"}) == 1.0
    assert matching.options({"A"}, {"A", "C"}) == 0.5
    assert matching.options({"A", "B"}, {"A", "C"}) == matching.options(set(), {"A"}) == 0.0


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"matching.optimal needs scipy: pip install tokcredit\[matching\]"):
        matching.optimal(S)
