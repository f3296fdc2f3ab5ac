import dataclasses

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit import inputs
from tokcredit.rollouts import FIELDS


def packed(**named):
    """Two rows and three tokens, two of them in the first row."""
    batch = tc.Rollouts(torch.arange(3), torch.tensor([0, 2, 3]), torch.tensor([0, 0]), torch.zeros(2))
    return batch.with_inputs(**named)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"expected a registered name, got 'entropy'; did you mean entropies\?"):
        inputs.get("entropy")
    with pytest.raises(ValueError, match=r"got 'xyzzy'; register it with tokcredit\.inputs\.register"):
        inputs.get("xyzzy")
    with pytest.raises(ValueError, match="got 'teacher_logprobs'"):
        packed(teacher_logprobs=torch.zeros(3))
    with pytest.raises(ValueError, match=r"did you mean state_values\?"):
        packed().has_input("state_value") or packed().input("state_value")


def test_an_input_of_ones_own():
    entry = inputs.register("difficulty", per="row", dtype="float", meaning="share of failed attempts")
    try:
        assert inputs.get("difficulty") is entry and entry.shape == "[R]" and entry.collector == "user"
        assert "difficulty" in inputs.names() and "difficulty" in inputs.names("user")
        assert "difficulty" not in inputs.names("policy")
        batch = packed(difficulty=torch.tensor([0.25, 0.5]))
        assert batch.select([1]).input("difficulty").tolist() == [0.5]
        inputs.register("difficulty", per="row", dtype="float", meaning="share of failed attempts")
        with pytest.raises(ValueError, match="name: expected a new name, got 'difficulty', which is share of failed"):
            inputs.register("difficulty", per="token", dtype="float", meaning="something else")
    finally:
        inputs._REGISTRY.pop("difficulty")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per": "group"}, "per: expected one of token, row, got 'group'"),
        ({"dtype": "int"}, "dtype: expected one of float, integer, bool, got 'int'"),
        ({"collector": "oracle"}, "collector: expected one of policy, .*, got 'oracle'"),
        ({"name": "entropies"}, "name: expected a new name, got 'entropies', which is entropy of the next-token"),
        ({"name": "two words"}, "name: expected a Python identifier"),
    ],
)
def test_registration_is_checked(changes, message):
    arguments = {"name": "difficulty", "per": "row", "dtype": "float", "meaning": "a number"} | changes
    with pytest.raises(ValueError, match=message):
        inputs.register(**arguments)
    assert "difficulty" not in inputs.names()


def test_every_entry_is_documented_and_collected():
    for name in inputs.names():
        entry = inputs.get(name)
        assert entry.name == name and entry.collector in inputs.COLLECTORS and len(entry.meaning) > 10
        assert not entry.meaning.endswith(".")
    assert set(FIELDS) == {"old_log_probs", "rollout_log_probs", "ref_log_probs", "entropies", "token_rewards"}
    assert frozenset().union(*map(inputs.names, inputs.COLLECTORS)) == inputs.names()


@pytest.mark.parametrize(
    ("name", "x", "error", "message"),
    [
        ("hidden_states", [1.0], TypeError, r"hidden_states: expected torch\.Tensor \[N, d\], got list"),
        ("hidden_states", torch.zeros(3, 4).long(), TypeError, r"hidden_states: expected float \[N, d\], got int64"),
        ("hidden_states", torch.zeros(3), ValueError, r"hidden_states: expected float \[3, d\], got float32 \[3\]"),
        ("token_probs", torch.zeros(2, 3), ValueError, r"token_probs: expected float \[3, K\], got float32 \[2, 3\]"),
        ("node_ids", torch.zeros(2), TypeError, r"node_ids: expected integer \[R\], got float32 \[2\]"),
        ("node_ids", torch.zeros(3).long(), ValueError, r"node_ids: expected integer \[2\], got int64 \[3\]"),
        ("truncated", torch.zeros(2), TypeError, r"truncated: expected bool \[R\], got float32 \[2\]"),
        ("entropies", torch.zeros(2), ValueError, r"entropies: expected .* \[3\], got float32 \[2\]"),
        (
            "state_values",
            torch.zeros(3, device="meta"),
            ValueError,
            "state_values: expected a tensor on cpu, got one on",
        ),
    ],
)
def test_inputs_are_checked_by_name(name, x, error, message):
    with pytest.raises(error, match=message):
        packed(**{name: x})


def test_inputs_with_an_argument_of_their_own():
    with pytest.raises(ValueError, match="extras: expected entropies as the argument of that name, got it in extras"):
        dataclasses.replace(packed(), extras={"entropies": torch.zeros(3)})
    batch = packed(entropies=torch.ones(3), state_values=torch.zeros(3))
    assert batch.has_input("entropies") and batch.has_input("state_values") and not batch.has_input("ref_log_probs")
    without = batch.with_inputs(entropies=None, state_values=None)
    assert without.entropies is None and without.extras == {}
    with pytest.raises(
        ValueError, match="ref_log_probs: expected in the batch because the objective reads it, got None"
    ):
        batch.input("ref_log_probs")


def test_inputs_may_have_the_layout_of_the_batch():
    batch, _ = naive.random_batch()
    flat = naive.with_inputs(batch, {"hidden_states", "token_probs"})
    shaped = flat.with_inputs(**{name: x.view(12, 7, -1) for name, x in flat.extras.items()})
    a, b = (tc.methods.thr().prepare(x).advantages for x in (flat, shaped))
    assert torch.equal(a, b) and a.any()
    rows = torch.tensor([3, 0, 5])
    for name in flat.extras:
        taken = shaped.select(rows).input(name)
        torch.testing.assert_close(taken, shaped.extras[name][rows].flatten(0, 1), equal_nan=True)


def test_inputs_of_rows_are_not_mistaken_for_inputs_of_tokens():
    """Two rows and two tokens, all in the first row."""
    batch = tc.Rollouts(
        torch.arange(2),
        torch.tensor([0, 2, 2]),
        torch.tensor([0, 0]),
        torch.zeros(2),
        extras={"node_ids": torch.tensor([7, 8]), "turn_rewards": torch.tensor([0.25, 0.5])},
    )
    second, first = batch.select(torch.tensor([1])), batch.select(torch.tensor([0]))
    assert second.extras["node_ids"].tolist() == [8] and second.extras["turn_rewards"].tolist() == []
    assert first.extras["node_ids"].tolist() == [7] and first.extras["turn_rewards"].tolist() == [0.25, 0.5]


def test_too_few_columns():
    batch = naive.with_inputs(naive.random_batch()[0], {"hidden_states", "token_probs"})
    with pytest.raises(ValueError, match="token_probs: expected at least 3 columns, got 2"):
        tc.methods.thr().prepare(batch.with_inputs(token_probs=torch.zeros(84, 2)))
