import math

import pytest
import tokcredit as tc
import torch
from tokcredit.blocks import divergence


def pair(seed=0, rows=6, vocabulary=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, vocabulary, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


def naive_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_the_sum(temperature):
    p, q = pair()
    out = divergence.kl(p, q, temperature)
    for a, b, got in zip((p / temperature).softmax(-1), (q / temperature).softmax(-1), out, strict=True):
        assert got.item() == pytest.approx(naive_kl(a.tolist(), b.tolist()))


def test_kl_gradients():
    p, q = (x.requires_grad_() for x in pair())
    assert torch.autograd.gradcheck(lambda a, b: divergence.kl(a, b, 0.8), (p, q))
    assert torch.autograd.gradcheck(lambda b: divergence.kl(p.detach(), b), (q,))


def test_kl_of_low_precision_is_computed_in_float32():
    p, q = pair(rows=40, vocabulary=50)
    exact = divergence.kl(p.bfloat16().double(), q.bfloat16().double())
    low = divergence.kl(p.bfloat16(), q.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-6)


def test_excluded_tokens():
    p = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -math.inf]])
    assert divergence.kl(p, q).tolist() == pytest.approx([math.log(1.5), math.inf])
    assert divergence.js(p, p).tolist() == pytest.approx([0, 0])
    both = divergence.js(p, q)
    m = [0.5 * (0.5 + 1 / 3), 0.5 * (0.5 + 1 / 3), 1 / 6]
    expected = (naive_kl([0.5, 0.5, 0], m) + naive_kl([1 / 3] * 3, m)) / 2
    assert both.tolist() == pytest.approx([expected, expected])


def test_a_position_without_gradient_may_hold_anything():
    p, q = pair()
    p[2] = math.nan
    p.requires_grad_()
    out = divergence.kl(p, q)
    out[[0, 1, 3, 4, 5]].sum().backward()
    assert p.grad.isfinite().all() and not p.grad[2].any() and p.grad[0].any()


@pytest.mark.parametrize("block", [1, 20, 1 << 22])
def test_js_of_disjoint_and_of_truncated_distributions(block, monkeypatch):
    monkeypatch.setattr(divergence, "_BLOCK", block)
    p, q = torch.tensor([[9.0, -math.inf]]), torch.tensor([[-math.inf, 3.0]])
    assert divergence.js(p, q).item() == pytest.approx(math.log(2))
    # 0.7 keeps 0.5 and 0.3 of p, 0.6 and 0.25 of q.
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.15, 0.25, 0.6]]).log()
    a, b = [0.625, 0.375, 0], [0, 0.25 / 0.85, 0.6 / 0.85]
    m = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    expected = (naive_kl(a, m) + naive_kl(b, m)) / 2
    assert divergence.js(p, q, top_p=0.7).item() == pytest.approx(expected, abs=1e-6)
    a, b = [0.5, 0.3, 0.2], [0.15, 0.25, 0.6]
    m = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    assert divergence.js(p, q).item() == pytest.approx((naive_kl(a, m) + naive_kl(b, m)) / 2, abs=1e-6)


def test_shapes_and_settings_are_checked():
    p, q = pair()
    assert divergence.kl(p.view(2, 3, 9), q.view(2, 3, 9)).shape == (2, 3)
    with pytest.raises(ValueError, match="q_logits: expected the shape of p_logits"):
        divergence.kl(p, q[:, 1:])
    with pytest.raises(ValueError, match="top_p: expected more than 0"):
        divergence.js(p, q, top_p=0.0)
    with pytest.raises(TypeError, match="p_logits: expected a float tensor, got int64"):
        divergence.js(p.long(), q)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        divergence.kl(p, q, 0)
    assert divergence.js(p[:0], q[:0]).shape == divergence.kl(p[:0], q[:0]).shape == (0,)


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
@pytest.mark.parametrize("padded", [False, True])
def test_disagreement_does_not_depend_on_blocks_or_on_what_masked_positions_hold(block, padded, monkeypatch):
    logits = torch.randn(8, 5, 11, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]] * 2)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    batch = tc.Rollouts.from_padded(torch.ones(8, 5, dtype=torch.long), mask, groups, torch.zeros(8))
    whole = divergence.disagreement(logits, batch, padded)
    monkeypatch.setattr(divergence, "_BLOCK", block)
    dirty = logits.masked_fill(mask[..., None] == 0, math.nan)
    torch.testing.assert_close(divergence.disagreement(dirty, batch, padded), whole, rtol=1e-4, atol=1e-6)
    assert whole.min() == 0 and whole.max() > 0.99
    alone = batch.select(torch.arange(4))
    torch.testing.assert_close(divergence.disagreement(logits[:4], alone, padded), whole[:20], rtol=1e-4, atol=1e-6)


def test_nucleus():
    log_p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]]).log()
    for top_p, kept in ((0.45, [[1, 0, 0], [0, 0, 1], [0.5, 0.5, 0]]), (1.0, log_p.exp().tolist())):
        torch.testing.assert_close(divergence.nucleus(log_p, top_p).exp(), torch.tensor(kept), rtol=1e-5, atol=1e-6)
    for wrong in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="top_p: expected"):
            divergence.nucleus(log_p, wrong)
