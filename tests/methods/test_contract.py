"""What every method promises, whatever it does; finds methods by itself."""

import dataclasses
import inspect
import pickle
from pathlib import Path

import naive
import pytest
import tokcredit as tc
import torch

ROOT = Path(__file__).parents[2]
METHODS = tc.methods.names()
each = pytest.mark.parametrize("name", METHODS)


def evidence(objective):
    have = {"old_log_probs"}
    batch, current = naive.random_batch()
    extra = {n: batch.shaped(batch.old_log_probs + 0.1) for n in objective.needs - have}
    return naive.random_batch(**extra)[0], current


@each
def test_is_documented_and_tested(name):
    function = getattr(tc.methods, name)
    assert "Source:" in function.__doc__ and "arXiv" in function.__doc__
    assert "Departs from the" in function.__doc__
    for argument in inspect.signature(function).parameters:
        assert f"{argument}: " in function.__doc__
    assert f"| `{name}` |" in (ROOT / "docs/methods.md").read_text()
    test = (ROOT / f"tests/methods/test_{name}.py").read_text()
    assert "def test_by_hand" in test
    assert "naive" in test or "reference" in test


@each
def test_prints_compares_pickles_and_converts(name):
    objective = tc.methods.load(name)
    assert objective == tc.methods.load(name)
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert eval(repr(objective), vars_of_stages()) == objective
    assert set(dataclasses.asdict(objective)) == {"credit", "weights", "ratio", "clip", "aggregation", "kl"}


def vars_of_stages():
    scope = {"Objective": tc.Objective, "inf": float("inf")}
    for stage in (tc.credit, tc.weights, tc.ratio, tc.clip, tc.aggregation, tc.loss):
        scope |= {k: v for k, v in vars(stage).items() if dataclasses.is_dataclass(v)}
    return scope


@each
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_add_up(name, seed):
    objective = tc.methods.load(name)
    batch, current = evidence(objective)
    prepared = objective.prepare(batch)
    whole = current.clone().requires_grad_()
    total = objective.loss(prepared, whole).loss
    total.backward()
    order = torch.randperm(batch.num_rows, generator=torch.Generator().manual_seed(seed))
    parts = current.clone().requires_grad_()
    loss = sum(objective.loss(prepared.select(rows), parts[rows]).loss for rows in order.split(5))
    loss.backward()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(parts.grad, whole.grad)
    assert whole.grad.abs().sum() > 0


@each
def test_ranks_average_to_the_whole(name):
    objective = tc.methods.load(name)
    if name == "dr_grpo":
        objective = tc.methods.dr_grpo(max_length=7)
    batch, current = evidence(objective)
    prepared = objective.prepare(batch)
    whole = current.clone().requires_grad_()
    objective.loss(prepared, whole).loss.backward()
    parts = current.clone().requires_grad_()
    for rank in range(2):
        rows = (batch.group_index % 2 == rank).nonzero()[:, 0]
        local = objective.prepare(
            batch.select(rows),
            batch_num_tokens=int(batch.lengths.sum()),
            global_batch_size=int((batch.lengths > 0).sum()),
            global_num_groups=batch.num_groups,
            dp_size=2,
        )
        (objective.loss(local, parts[rows]).loss / 2).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@each
def test_packed_equals_padded(name):
    objective = tc.methods.load(name)
    batch, current = evidence(objective)
    spans = list(zip(batch.begin.tolist(), batch.end.tolist(), strict=True))
    keep = torch.cat([torch.arange(b, e) for b, e in spans])
    packed = tc.Rollouts(
        batch.tokens[keep],
        torch.tensor([0, *(e - b for b, e in spans)]).cumsum(0),
        batch.group_ids,
        batch.rewards,
        batch.response_mask[keep],
        **{
            n: x[keep]
            for n in ("old_log_probs", "rollout_log_probs", "ref_log_probs", "entropies")
            if (x := getattr(batch, n)) is not None
        },
    )
    if name == "dr_grpo":
        objective = tc.methods.dr_grpo(max_length=7)
    a = objective.loss(objective.prepare(batch), current).loss
    b = objective.loss(objective.prepare(packed), current.reshape(-1)[keep]).loss
    torch.testing.assert_close(a, b)


@each
def test_masked_tokens_cannot_leak(name):
    objective = tc.methods.load(name)
    batch, current = evidence(objective)
    clean = current.clone().requires_grad_()
    objective.loss(objective.prepare(batch), clean).loss.backward()
    mask = batch.shaped(batch.response_mask)
    for poison in (float("nan"), float("inf"), 1e30):
        dirty = current.masked_fill(~mask, poison).requires_grad_()
        old = batch.shaped(batch.old_log_probs).masked_fill(~mask, -poison).reshape(-1)
        poisoned = dataclasses.replace(batch, old_log_probs=old)
        out = objective.loss(objective.prepare(poisoned), dirty)
        out.loss.backward()
        assert out.loss.isfinite() and all(m.isfinite() for m in out.metrics.values())
        torch.testing.assert_close(dirty.grad, clean.grad)


@each
def test_all_masked_is_zero_and_attached(name):
    objective = tc.methods.load(name)
    batch, current = evidence(objective)
    batch = dataclasses.replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    prepared = objective.prepare(batch)
    log_probs = current.clone().requires_grad_()
    out = objective.loss(prepared, log_probs)
    out.loss.backward()
    assert out.loss == 0 and not log_probs.grad.any()
    assert not prepared.has_credit.any()


@each
def test_rows_without_credit_have_no_gradient(name):
    objective = tc.methods.load(name)
    batch, current = evidence(objective)
    batch = dataclasses.replace(batch, rewards=torch.where(batch.group_index == 0, 1.0, batch.rewards))
    prepared = objective.prepare(batch)
    log_probs = current.clone().requires_grad_()
    objective.loss(prepared, log_probs).loss.backward()
    paid = prepared.has_credit
    assert not paid[batch.group_index == 0].any() and paid.any()
    assert not log_probs.grad[~paid].any()


@each
def test_absent_old_log_probs_mean_on_policy(name):
    objective = tc.methods.load(name)
    if "old_log_probs" in objective.needs:
        pytest.skip("needs old_log_probs")
    batch, current = evidence(objective)
    grads = []
    for old in (None, current.reshape(-1)):
        log_probs = current.clone().requires_grad_()
        objective.loss(objective.prepare(dataclasses.replace(batch, old_log_probs=old)), log_probs).loss.backward()
        grads.append(log_probs.grad)
    torch.testing.assert_close(*grads)


def test_unknown_names_and_settings_are_errors():
    with pytest.raises(ValueError, match="name: expected one of ba, cispo"):
        tc.methods.load("ppo2")
    with pytest.raises(TypeError, match="beta: expected one of clip_low"):
        tc.methods.load("tempo", beta=1)
