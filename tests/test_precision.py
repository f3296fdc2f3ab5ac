"""Results depend on the dtypes of the batch, not on torch's default dtype, and float64 stays float64."""

import dataclasses
import math

import naive
import pytest
import tokcredit as tc
import torch

POLICY = naive.OF_GROUPS


def batch_for(name, dtype, seed=0):
    batch, current = naive.random_batch(seed)
    objective = tc.methods.load(name)
    batch = naive.with_inputs(batch, objective.required_inputs | {"old_log_probs"})
    floats = {k: x.to(dtype) for k, x in batch.extras.items() if x.is_floating_point()}
    for field in tc.rollouts.FIELDS:
        if (x := getattr(batch, field)) is not None:
            floats[field] = x.to(dtype)
    batch = batch.with_inputs(**floats)
    return objective, dataclasses.replace(batch, rewards=batch.rewards.to(dtype)), current.to(dtype)


def step(objective, batch, current):
    prepared = objective.prepare(batch, progress=0.5)
    x = current.clone().requires_grad_()
    out = naive.loss_of(objective, prepared, x)
    out.loss.backward()
    return prepared.advantages, out.loss.detach(), x.grad, dict(out.metrics)


@pytest.fixture
def bfloat16_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", POLICY)
def test_the_default_dtype_changes_nothing(name):
    objective, batch, current = batch_for(name, torch.float32)
    expected = step(objective, batch, current)
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = step(objective, batch, current)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(ours[:3], expected[:3], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert expected[2].any()
    for key, value in expected[3].items():
        torch.testing.assert_close(ours[3][key], value, rtol=0, atol=0)


def test_blocks_do_not_read_the_default_dtype(bfloat16_default):
    spans = tc.Spans.from_cu_seqlens(torch.tensor([0, 300]))
    assert tc.scan.positions(spans)[-1].item() == 300 and tc.scan.positions(spans).dtype == torch.float32
    assert tc.segment.count(spans).tolist() == [300] and tc.length.remaining(spans)[0] == 300
    x = torch.arange(300, dtype=torch.float32)
    assert tc.segment.sum(x, spans).item() == 299 * 150 and tc.select.kth(x, 299, spans).item() == 299.0
    assert tc.select.quantile(x, 0.5, spans).item() == 149.5
    rewards = torch.tensor([0.0, 1.0, 0.001], dtype=torch.float32)
    batch = tc.Rollouts(torch.arange(3), torch.arange(4), torch.zeros(3, dtype=torch.long), rewards)
    tree = tc.tree.build(batch)
    assert tc.values.monte_carlo(tree)[0].item() == pytest.approx(1.001 / 3, rel=1e-6)


def test_pairs_do_not_read_the_default_dtype(bfloat16_default):
    tokens, mask = torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    ref = (torch.tensor([[-0.5, -0.25]], dtype=torch.float32), torch.tensor([[-1.0, -0.125]], dtype=torch.float32))
    batch = tc.Rollouts.from_pairs(tokens, tokens, mask, mask, ref_log_probs=ref)
    assert batch.rewards.dtype == torch.float32
    objective = tc.methods.dpo()
    current = torch.tensor([[-0.51, -0.25], [-1.0, -0.137]], dtype=torch.float32)
    loss = objective.loss(objective.prepare(batch), current).loss
    assert loss.item() == pytest.approx(math.log1p(math.exp(-objective.link.beta * 0.002)), rel=1e-6)


@pytest.mark.parametrize("name", POLICY)
def test_float64_goes_through(name):
    """Rounding any input or constant to float32 on the way would change results by more than 1e-12."""
    objective, batch, current = batch_for(name, torch.float64)
    prepared = objective.prepare(batch, progress=0.5)
    assert prepared.advantages.dtype == torch.float64
    x = current.clone().requires_grad_()
    further = naive.further(objective, current)
    loss = objective.loss(prepared, x, **further).loss
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.dtype == grad.dtype == torch.float64
    direction = torch.where(grad != 0, torch.sin(torch.arange(84.0, dtype=torch.float64)).view(12, 7), 0)
    moved = objective.loss(prepared, current + 1e-9 * direction, **further).loss.item() - loss.item()
    if isinstance(getattr(objective, "ratio", None), tc.ratio.one):
        return  # the value of the score function does not depend on the log-probs
    # Rounded to float32 anywhere, a move of 1e-9 would change nothing, or a hundred times too much.
    assert 0 < abs(moved) < 1e-7
    coupled = getattr(getattr(objective, "ratio", None), "couples_tokens", False)
    if name != "tip" and naive.is_integral(prepared) and not coupled:
        assert moved / 1e-9 == pytest.approx((grad * direction).sum().item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "name", ["grpo", "hapo", "divergence_weighted", "thr", "nthr", "tw_grpo", "canon", "spae", "d3s", "tip", "otb"]
)
def test_inputs_may_be_attached_to_a_graph(name):
    """They count as numbers: results are the same, and no gradient reaches them."""
    objective, batch, current = batch_for(name, torch.float64)
    expected = step(objective, batch, current)
    leaves = {}
    for key in (*tc.rollouts.FIELDS, *batch.extras):
        x = getattr(batch, key) if key in tc.rollouts.FIELDS else batch.extras[key]
        if x is not None and x.is_floating_point():
            leaves[key] = x.clone().requires_grad_()
    attached = batch.with_inputs(**{key: x * 1 for key, x in leaves.items()})
    ours = step(objective, attached, current)
    for a, b in zip(ours[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    assert not ours[0].requires_grad and all(x.grad is None for x in leaves.values())


@pytest.mark.parametrize("name", tc.methods.names())
def test_a_padded_batch_of_no_rows(name):
    objective = tc.methods.load(name)
    for width in (0, 5):
        tokens, mask = torch.zeros(0, width, dtype=torch.long), torch.zeros(0, width, dtype=torch.bool)
        batch = tc.Rollouts.from_padded(tokens, mask, torch.zeros(0, dtype=torch.long), torch.zeros(0))
        batch = naive.with_inputs(batch, objective.required_inputs)
        log_probs = torch.zeros(0, width, requires_grad=True)
        prepared = objective.prepare(batch, progress=0.5)
        for part in (prepared, prepared.select([]), prepared.minibatch([])):
            out = naive.loss_of(objective, part, log_probs)
            out.loss.backward()
            assert out.loss == 0 and prepared.advantages.shape == (0, width) and out.metrics["tokens"] == 0
