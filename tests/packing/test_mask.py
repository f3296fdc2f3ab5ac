import itertools
import random
from types import SimpleNamespace

import causal
import pytest
import tokcredit as tc
import torch
from tokcredit.packing.mask import BLOCK, TreeMask
from tokcredit.packing.tree_attention import _tree_attention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def plan_of(generator, count, longest):
    """A plan of rows of which each shares a prefix with an earlier one."""
    rows = [[generator.randrange(50) for _ in range(longest)]]
    for _ in range(count - 1):
        like = generator.choice(rows)
        cut = generator.randrange(len(like))
        rows.append(like[:cut] + [generator.randrange(50) for _ in range(generator.randint(1, longest - cut))])
    return tc.packing.pack(causal.batch([([1], row) for row in rows[:6]]))


def padded(part):
    rest = -part.end.numel() % BLOCK
    size = part.end.numel()
    return TreeMask(
        torch.cat([part.end, torch.arange(size + 1, size + rest + 1)]),
        torch.nn.functional.pad(part.position_ids, (0, rest)),
        flex=True,
    )


def chosen(count, indices, blocks):
    """Pairs of blocks that a list names, as a matrix."""
    out = torch.zeros(blocks, blocks, dtype=torch.bool)
    for query in range(blocks):
        out[query, indices[0, 0, query, : int(count[0, 0, query])].long()] = True
    return out


@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("seed", range(4))
def test_block_lists(seed, window):
    """They are those that evaluating the mask for every pair gives; with a window they may hold more."""
    mask = padded(plan_of(random.Random(seed), 6, 400).part(0))
    size = mask.end.numel()
    blocks = mask.blocks(window)
    expected = create_block_mask(blocks.mask_mod, None, None, size, size, device="cpu", BLOCK_SIZE=BLOCK)
    names = (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices"))
    ours, theirs = (
        [chosen(getattr(x, count), getattr(x, index), size // BLOCK) for count, index in names]
        for x in (blocks, expected)
    )
    if window is None:
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert not ((theirs[0] | theirs[1]) & ~(ours[0] | ours[1])).any()
    assert not (ours[1] & ~theirs[1]).any() and not (ours[0] & ours[1]).any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 40])
def test_flex_attention_is_dense_attention(window):
    mask = padded(plan_of(random.Random(5), 6, 150).part(0))
    query, key, value = torch.randn(3, 1, 2, mask.end.numel(), 16, generator=torch.Generator().manual_seed(0))
    found = flex_attention(query, key, value, block_mask=mask.blocks(window))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense(window))
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)


def by_segments(plan, query, key, value, window):
    """Attention of one segment after another to the places of its path, gathered."""
    begin, parent, out = plan.arrays.segment_begin.tolist(), plan.parent.tolist(), []
    for first, last in itertools.pairwise(begin):
        path = [last - 1]
        while parent[path[-1]] >= 0:
            path.append(parent[path[-1]])
        path.reverse()
        scores = query[:, :, first:last] @ key[:, :, path].transpose(2, 3) * query.shape[-1] ** -0.5
        distance = plan.position_ids[first:last, None] - torch.arange(len(path))
        seen = (distance >= 0) & (distance < (window or len(path)))
        out.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, :, path])
    return torch.cat(out, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3])
def test_dense_attention_is_attention_by_segments(window):
    plan = plan_of(random.Random(6), 6, 12)
    part = plan.part(0)
    config = SimpleNamespace(layer_types=None, sliding_window=window)
    module = SimpleNamespace(config=config, num_key_value_groups=2)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, plan.num_places, 8, generator=generator, requires_grad=True)
    key, value = torch.randn(2, 1, 2, plan.num_places, 8, generator=generator).requires_grad_()
    mask = TreeMask(part.end, part.position_ids)
    found, _ = _tree_attention(module, query, key, value, None, sliding_window=window, tree_mask=mask)
    expected = by_segments(plan, query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(found.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), (query, key, value), retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral"])
def test_a_model_with_flex_attention(monkeypatch, kind):
    """Padded to whole blocks. Not compiled, FlexAttention runs on the CPU too."""
    monkeypatch.setattr("tokcredit.packing.tree_attention._compiled", lambda: flex_attention)
    model, part = causal.model(kind), tc.packing.pack(causal.batch()).part(0)
    with torch.no_grad():
        flex, dense = (tc.packing.forward(model, part, attention=name) for name in ("flex", "dense"))
    for ours, theirs in zip(flex, dense, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral", "gpt_oss"])
def test_flex_attention_on_a_device(cuda, kind):
    """Log-probs and gradients are those of the dense mask."""
    model = causal.model(kind, head_dim=16).to(cuda)
    with cuda:
        part = tc.packing.pack(causal.batch()).part(0)
    results = []
    for name in ("flex", "dense"):
        model.zero_grad()
        out = tc.packing.forward(model, part, attention=name)
        (out.log_probs.sum() + out.entropies.sum()).backward()
        results.append((out, torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    scale = float(results[1][1].abs().max())
    torch.testing.assert_close(results[0][1] / scale, results[1][1] / scale, atol=1e-3, rtol=1e-2)
