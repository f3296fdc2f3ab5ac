"""What every method promises, whatever it does; finds methods by itself."""

import dataclasses
import importlib.util
import inspect
import pickle
from pathlib import Path

import naive
import pytest
import tokcredit as tc
import tokcredit.mixing
import torch
from tokcredit.rollouts import FIELDS

ROOT = Path(__file__).parents[2]
METHODS = tc.methods.names()
each = pytest.mark.parametrize("name", METHODS)


def carried(objective):
    batch, current = naive.random_batch()
    return naive.with_inputs(batch, objective.required_inputs), current


def prepare(objective, batch, **counts):
    return objective.prepare(batch, progress=0.5 if objective.is_scheduled else None, **counts)


def loss(objective, batch, log_probs):
    return objective.loss(prepare(objective, batch), log_probs)


@each
def test_is_documented_and_tested(name):
    function = getattr(tc.methods, name)
    assert "Source:" in function.__doc__ and "arXiv" in function.__doc__
    assert "Departs from the" in function.__doc__ and "Cost:" in function.__doc__
    for argument in inspect.signature(function).parameters:
        assert f"{argument}: " in function.__doc__
    test = (ROOT / f"tests/methods/test_{name}.py").read_text()
    assert "def test_by_hand" in test
    assert "naive" in test or "reference" in test


def test_tables_are_those_of_the_methods():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for document in ("docs/methods.md", "README.md"):
        text = (ROOT / document).read_text()
        assert text == tables.filled(text), f"{document} is out of date: python docs/tables.py"
        assert all(f"| `{name}` |" in text for name in METHODS)
    required_inputs = set().union(*(tc.methods.load(name).required_inputs for name in METHODS))
    assert required_inputs <= tc.inputs.names()


@each
def test_prints_compares_pickles_and_converts(name):
    objective = tc.methods.load(name)
    assert objective == tc.methods.load(name)
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert eval(repr(objective), vars_of_stages()) == objective
    assert set(dataclasses.asdict(objective)) == {f.name for f in dataclasses.fields(tc.Objective)}


def vars_of_stages():
    return {**tokcredit.mixing.inner(), "inf": float("inf")}


@each
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_add_up(name, seed):
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    prepared = prepare(objective, batch)
    whole = current.clone().requires_grad_()
    total = objective.loss(prepared, whole).loss
    total.backward()
    order = torch.randperm(batch.num_rows, generator=torch.Generator().manual_seed(seed))
    parts = current.clone().requires_grad_()
    added = sum(objective.loss(prepared.select(rows), parts[rows]).loss for rows in order.split(5))
    added.backward()
    torch.testing.assert_close(added, total)
    torch.testing.assert_close(parts.grad, whole.grad)
    assert whole.grad.abs().sum() > 0


@each
def test_ranks_average_to_the_whole(name):
    """Each rank has its own groups; where rows of different groups are compared, it takes its rows from the whole."""
    objective = tc.methods.load(name)
    if isinstance(objective.aggregation, tc.aggregation.sequence_sum):
        objective = dataclasses.replace(objective, aggregation=tc.aggregation.sequence_sum(7))
    batch, current = carried(objective)
    whole = current.clone().requires_grad_()
    prepared = prepare(objective, batch)
    objective.loss(prepared, whole).loss.backward()
    parts = current.clone().requires_grad_()
    trained = torch.stack([x.any() for x in prepared.mask.split(7)])
    for rank in range(2):
        rows = (batch.group_index % 2 == rank).nonzero()[:, 0]
        if objective.compares_groups:
            local = prepare(objective, batch, dp_size=2).select(rows)
        else:
            local = prepare(
                objective,
                batch.select(rows),
                batch_num_tokens=int(prepared.mask.sum()),
                global_batch_size=int(trained.sum()),
                global_num_groups=len(set(batch.group_index[trained].tolist())),
                dp_size=2,
            )
        (objective.loss(local, parts[rows]).loss / 2).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@each
def test_packed_equals_padded(name):
    objective = tc.methods.load(name)
    if isinstance(objective.aggregation, tc.aggregation.sequence_sum):
        objective = dataclasses.replace(objective, aggregation=tc.aggregation.sequence_sum(7))
    batch, current = carried(objective)
    spans = list(zip(batch.begin.tolist(), batch.end.tolist(), strict=True))
    keep = torch.cat([torch.arange(b, e) for b, e in spans])

    def pick(name):
        x = batch.input(name)
        return x[keep] if tc.inputs.get(name).per == "token" else x

    packed = tc.Rollouts(
        batch.tokens[keep],
        torch.tensor([0, *(e - b for b, e in spans)]).cumsum(0),
        batch.group_ids,
        batch.rewards,
        batch.response_mask[keep],
        **{name: pick(name) for name in FIELDS if getattr(batch, name) is not None},
        extras={name: pick(name) for name in batch.extras},
    )
    a = loss(objective, batch, current).loss
    b = loss(objective, packed, current.reshape(-1)[keep]).loss
    torch.testing.assert_close(a, b)


@each
def test_masked_tokens_cannot_leak(name):
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    clean = current.clone().requires_grad_()
    loss(objective, batch, clean).loss.backward()
    mask = batch.shaped(batch.response_mask)
    for poison in (float("nan"), float("inf"), 1e30):
        dirty = current.masked_fill(~mask, poison).requires_grad_()
        old = batch.shaped(batch.old_log_probs).masked_fill(~mask, -poison).reshape(-1)
        poisoned = dataclasses.replace(batch, old_log_probs=old)
        out = loss(objective, poisoned, dirty)
        out.loss.backward()
        assert out.loss.isfinite() and all(m.isfinite() for m in out.metrics.values())
        torch.testing.assert_close(dirty.grad, clean.grad)


@each
def test_all_masked_is_zero_and_attached(name):
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    batch = dataclasses.replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    prepared = prepare(objective, batch)
    log_probs = current.clone().requires_grad_()
    out = objective.loss(prepared, log_probs)
    out.loss.backward()
    assert out.loss == 0 and not log_probs.grad.any()
    assert not prepared.has_gradient.any()


@each
def test_rows_without_credit_have_no_gradient(name):
    objective = tc.methods.load(name)
    batch, current = carried(objective)
    batch = dataclasses.replace(batch, rewards=torch.where(batch.group_index == 0, 1.0, batch.rewards))
    prepared = prepare(objective, batch)
    unpaid = ~torch.stack([row.any() for row in prepared.advantages])
    log_probs = current.clone().requires_grad_()
    objective.loss(prepared, log_probs).loss.backward()
    paid = prepared.has_gradient
    assert not paid[unpaid].any() and paid.any()
    assert not log_probs.grad[~paid].any()
    assert not log_probs.grad[~prepared.mask.view(batch.shape)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "tempo"])
def test_equal_rewards_cancel_exactly(name, dtype):
    """Sums of equal numbers are not always their multiple; divided by a spread of 0 the difference would be pay."""
    objective = tc.methods.load(name)
    for size in range(2, 33):
        rewards = torch.cat([torch.full((size,), r, dtype=dtype) for r in (0.1, 0.7, 0.9, 1.1, -0.3)])
        tokens = torch.stack([torch.zeros(5 * size), torch.arange(5.0 * size)], 1).long()
        groups = torch.arange(5).repeat_interleave(size)
        batch = tc.Rollouts.from_padded(tokens, torch.ones_like(tokens), groups, rewards)
        prepared = objective.prepare(batch)
        assert not prepared.advantages.any() and not prepared.has_gradient.any()


@each
def test_groups_of_equal_rewards_are_paid_nothing(name):
    objective = tc.methods.load(name)
    batch, _ = carried(objective)
    if prepare(objective, dataclasses.replace(batch, rewards=torch.ones(12))).advantages.any():
        pytest.skip("pays rewards, or evidence besides them")
    batch = dataclasses.replace(batch, rewards=torch.where(batch.group_index == 0, 0.7, batch.rewards))
    assert not prepare(objective, batch).has_gradient[batch.group_index == 0].any()


@each
def test_absent_old_log_probs_mean_on_policy(name):
    objective = tc.methods.load(name)
    if "old_log_probs" in objective.required_inputs:
        pytest.skip("needs old_log_probs")
    batch, current = carried(objective)
    grads = []
    for old in (None, current.reshape(-1)):
        log_probs = current.clone().requires_grad_()
        loss(objective, dataclasses.replace(batch, old_log_probs=old), log_probs).loss.backward()
        grads.append(log_probs.grad)
    torch.testing.assert_close(*grads)


def test_unknown_names_and_settings_are_errors():
    with pytest.raises(ValueError, match="name: expected one of ba, canon"):
        tc.methods.load("ppo2")
    with pytest.raises(TypeError, match="beta: expected one of clip_low"):
        tc.methods.load("tempo", beta=1)
