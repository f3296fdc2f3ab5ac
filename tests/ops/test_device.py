"""What only a GPU can show: streams, several devices, graphs, no waiting, sizes beyond 2^31."""

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit import ops
from tokcredit.blocks import log_probs, scan, segment, select, tree
from tokcredit.rollouts import FIELDS

pytestmark = pytest.mark.gpu

# Pairs need batches of pairs, which tests/test_preference.py has on the CPU.
POLICY = naive.OF_GROUPS


def spans_on(device, *edges):
    return tc.Spans.from_cu_seqlens(torch.tensor(edges, device=device))


def batch_on(device, seed=0, names=()):
    """A batch with these inputs, made on the CPU and moved, so that it is the same on every device."""
    with torch.device("cpu"):
        batch, current = naive.random_batch(seed, groups=6, size=8, length=700)
        batch = naive.with_inputs(batch, names)
    tensors = {
        name: x.to(device)
        for name in ("tokens", "group_ids", "rewards", "response_mask", *FIELDS)
        if (x := getattr(batch, name)) is not None
    }
    extras = {name: x.to(device) for name, x in batch.extras.items()}
    spans = tc.Spans.from_padded((batch.end - batch.begin).to(device), 700)
    return tc.Rollouts(**tensors, cu_seqlens=spans, extras=extras, shape=batch.shape), current.to(device)


def test_the_current_stream_is_used(cuda):
    """On a stream that is kept busy, an operation that ran on another one would read what is not there yet."""
    source = torch.arange(1.0, 1_000_001, device=cuda)
    x = torch.zeros_like(source)
    logits = torch.zeros(64, 1000, device=cuda)
    tokens = torch.zeros(64, dtype=torch.long, device=cuda)
    spans = spans_on(cuda, 0, 400_000, 1_000_000)
    group = torch.zeros(2, dtype=torch.long, device=cuda)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.copy_(source)
        logits[:, 0] = 3.0
        total = scan.cumulative(x, spans)
        largest = segment.maximum(x, spans)
        chosen = select.top_k(x, 1, spans)
        value, _ = ops.policy_loss(x, spans, "k1", reference=x, cumulative=True)
        _, to_go = ops.baseline(-x, x, x, spans, group, 1, with_returns=True)
        chosen_log_probs = log_probs.from_logits(logits, tokens)
    stream.synchronize()
    assert largest.tolist() == [400_000.0, 1_000_000.0]
    assert total[399_999].item() == pytest.approx(400_000 * 400_001 / 2)
    assert chosen.nonzero()[:, 0].tolist() == [399_999, 999_999]
    assert to_go[399_998:400_000].tolist() == [799_999.0, 400_000.0]
    assert value.tolist() == [0, 0]
    torch.testing.assert_close(chosen_log_probs, torch.log_softmax(logits, 1)[:, 0])


def test_the_tensors_device_is_used_and_the_callers_restored(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    with torch.cuda.device(0):
        batch, current = batch_on("cuda:1")
        objective = tc.methods.load("tempo")
        out = objective.loss(objective.prepare(batch), current)
        assert out.loss.device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
    batch, current = batch_on("cpu")
    torch.testing.assert_close(out.loss.cpu(), objective.loss(objective.prepare(batch), current).loss)


def test_tensors_on_the_wrong_device_are_refused(cuda):
    x = torch.ones(4, device=cuda)
    spans = spans_on("cpu", 0, 4)
    with pytest.raises(ValueError, match="scan: begin: expected the device of the other arguments, got another device"):
        ops.scan(x, spans)
    spans = spans_on(cuda, 0, 4)
    with pytest.raises(ValueError, match="policy_loss: reference: expected the device of the other arguments"):
        ops.policy_loss(x, spans, "clip", reference=torch.ones(4))
    with pytest.raises(ValueError, match="segment: mask: expected the device of the other arguments"):
        segment.sum(x, tc.Spans.trusted(spans.begin, spans.end, 4, torch.ones(4, dtype=torch.bool)))


@pytest.mark.parametrize("name", POLICY)
def test_methods_agree_with_the_cpu(cuda, name):
    results = []
    for device in ("cpu", cuda):
        objective = tc.methods.load(name)
        batch, current = batch_on(device, names=objective.required_inputs)
        prepared = objective.prepare(batch, progress=0.5)
        log_probs = current.clone().requires_grad_()
        out = objective.loss(prepared, log_probs)
        out.loss.backward()
        results.append((prepared.advantages.cpu(), out.loss.detach().cpu(), log_probs.grad.cpu()))
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)
    assert results[0][2].abs().sum() > 0


def test_trees_are_those_of_the_cpu(cuda):
    for seed in range(5):
        ours, expected = (tree.build(batch_on(device, seed)[0]) for device in (cuda, "cpu"))
        for name in ("leaf", "parent", "group", "depth", "length", "count", "degree", "size"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize("name", POLICY)
def test_loss_is_captured_in_a_graph_and_waits_for_nothing(cuda, name):
    objective = tc.methods.load(name)
    batch, current = batch_on(cuda, names=objective.required_inputs)
    prepared = objective.prepare(batch, progress=0.5)
    log_probs = current.clone().requires_grad_()

    def step():
        log_probs.grad = None
        out = objective.loss(prepared, log_probs)
        out.loss.backward()
        return out.loss.detach(), log_probs.grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    with torch.no_grad():
        log_probs += 0.05 * torch.randn_like(log_probs)
    graph.replay()
    replayed = loss.clone(), grad.clone()
    for ours, expected in zip(replayed, step(), strict=True):
        assert torch.equal(ours, expected)


def needs_memory(gigabytes):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"{gigabytes} GB of device memory, {free:.0f} free")


def test_more_than_two_to_the_31_tokens(cuda):
    needs_memory(60)
    n = 2**31 + 4099
    half = 2**30
    spans = spans_on(cuda, 0, half, n)
    x = torch.ones(n, dtype=torch.bfloat16, device=cuda)
    x[-1] = 5.0
    x[half] = 3.0
    assert segment.sum(x, spans).tolist() == pytest.approx([half, n - half + 6])
    chosen = select.top_k(x, 2, spans, select.everything(spans))
    assert chosen.sum() == 2 and chosen[-1] and chosen[half]
    assert select.kth(x, n - 3, spans, select.everything(spans)).item() == 1.0
    del chosen
    y, last = ops.scan(x, spans)
    assert last.tolist() == pytest.approx([half, n - half + 6])
    assert y[half].item() == 3.0 and y[-1].item() == last[1].item()
    del y
    group = torch.zeros(2, dtype=torch.long, device=cuda)
    advantages, _ = ops.baseline(torch.full_like(x, -torch.inf), x, x.new_tensor([[0.0], [1.0]]), spans, group, 1)
    assert advantages[[half - 1, -4100, -4099, -1]].tolist() == pytest.approx([-0.5, 0.5, 1, 1])
    del advantages
    tail = ops.spread(torch.tensor([False, True], device=cuda), spans)
    assert not tail[half - 1] and tail[half] and tail[-1]
    del tail
    x.requires_grad_()
    value, stats = ops.policy_loss(x, spans, "k1", reference=torch.ones_like(x))
    value.sum().backward()
    assert value.tolist() == [0.0, 6.0] and stats[:, 1].tolist() == [half, n - half]
    assert x.grad[0] == x.grad[-1] == 1


def test_more_than_two_to_the_31_logits(cuda):
    needs_memory(40)
    vocabulary = 262_144
    logits = torch.zeros(2**13 + 1, vocabulary, dtype=torch.bfloat16, device=cuda)
    logits[-1, -1] = 4.0
    tokens = torch.full((logits.shape[0],), vocabulary - 1, device=cuda)
    logits.requires_grad_()
    chosen = log_probs.from_logits(logits, tokens)
    expected = torch.log_softmax(logits[-1:].detach().float(), 1)[0, -1]
    torch.testing.assert_close(chosen[-1], expected)
    chosen[-1].backward()
    torch.testing.assert_close(logits.grad[-1, -1].float(), 1 - expected.exp(), rtol=1e-2, atol=1e-3)
    assert not logits.grad[:-1].any()
