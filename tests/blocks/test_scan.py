import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.scan import scan as reference
from tokcredit import Spans, ops
from tokcredit.blocks import scan

pytestmark = pytest.mark.usefixtures("device")


def one_row():
    return Spans.single(4, mask=torch.tensor([True, True, False, True]))


@given(ragged.spans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1.0, 0.9, 0.0, -0.5, None]))
def test_matches_definition(spans, reverse, exclusive, carried, decay):
    x = ragged.values(spans.size)
    carry = ragged.values(spans.num_rows, seed=1) if carried else None
    decay = ragged.values(spans.num_rows, seed=2) if decay is None else decay  # one for each row
    y, last = ops.scan(x, spans, decay, carry, reverse, exclusive)
    expected, expected_last = reference(x, *spans.arrays, decay, carry, reverse, exclusive)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last, expected_last)


def test_worked_example():
    x = torch.tensor([1.0, 2.0, float("nan"), 4.0])
    y, last = ops.scan(x, one_row(), decay=0.5)
    assert y.tolist() == [1.0, 2.5, 0.0, 5.25]
    assert last.tolist() == [5.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_accumulated_in_float32(dtype):
    x = ragged.values(5000, dtype)
    spans = ragged.packed(2500, 2500)
    y, _ = ops.scan(x, spans)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference(x, *spans.arrays)[0].float(), rtol=1e-6, atol=1e-5)


def test_long_row_keeps_its_digits():
    x = ragged.values(131_072, torch.float32) * 1e-2
    exact = x.double().cumsum(0)
    ours = (ops.scan(x, Spans.single(131_072))[0] - exact).abs().max()
    assert ours <= (x.cumsum(0) - exact).abs().max()
    assert ours < 1e-6 * exact.abs().max()


@given(ragged.spans(max_rows=3, max_length=4), st.booleans(), st.booleans(), st.sampled_from([1.0, 0.7, 0.0, None]))
def test_gradient(spans, reverse, exclusive, decay):
    decay = ragged.values(spans.num_rows, seed=2) if decay is None else decay
    x = ragged.values(spans.size).requires_grad_()
    carry = ragged.values(spans.num_rows, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda x, c: ops.scan(x, spans, decay, c, reverse, exclusive), (x, carry))


def test_thread_count_does_not_change_bits(monkeypatch):
    x = ragged.values(300_000, torch.float32)
    spans = ragged.packed(*[3000] * 100)
    monkeypatch.setattr(ops.call, "_threads", 1)
    one = ops.scan(x, spans, 0.99)[0]
    monkeypatch.setattr(ops.call, "_threads", 7)
    assert torch.equal(one, ops.scan(x, spans, 0.99)[0])


def test_opcheck():
    x = ragged.values(4, torch.float32)
    torch.library.opcheck(
        torch.ops.tokcredit.scan.default, (x, *one_row().arrays, 0.9, None, torch.ones(1), True, False, 1)
    )


def test_compiles_without_graph_breaks():
    x = ragged.values(4).requires_grad_()

    def f(x):
        return scan.cumulative(x, one_row()).square().sum()

    (eager,) = torch.autograd.grad(f(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)


@given(ragged.spans(), st.sampled_from([1.0, 0.9]), st.sampled_from([1.0, 0.5, 0.0]))
def test_generalized_advantages(spans, discount, trace):
    rewards, values = ragged.values(spans.size), ragged.values(spans.size, seed=1)
    ours = scan.generalized_advantages(rewards, values, spans, discount, trace)
    for b, e in zip(spans.begin.tolist(), spans.end.tolist(), strict=True):
        after, advantage = 0.0, 0.0
        for t in reversed(range(b, e)):
            if spans.mask is not None and not spans.mask[t]:
                assert ours[t] == 0
                continue
            delta = rewards[t].item() + discount * after - values[t].item()
            advantage = delta + discount * trace * advantage
            after = values[t].item()
            assert abs(ours[t].item() - advantage) < 1e-9


def test_positions_and_returns():
    assert scan.positions(one_row()).tolist() == [1, 2, 0, 3]
    assert scan.returns(torch.tensor([1.0, 0, 9, 8]), one_row(), 0.5).tolist() == [3.0, 4.0, 0.0, 8.0]


def test_rejects_wrong_arguments():
    with pytest.raises(ValueError, match=r"x: expected .* \[4\], got float32 \[3\]"):
        scan.cumulative(torch.ones(3), one_row())
    with pytest.raises(ValueError, match=r"carry: expected .* \[1\], got float32 \[2\]"):
        scan.cumulative(torch.ones(4), one_row(), carry=torch.ones(2))
    with pytest.raises(TypeError, match=r"spans: expected tokcredit\.Spans, got Tensor; see Spans\.from_cu_seqlens"):
        scan.positions(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"scan: decays: expected float64 \[1\], got float64 \[2\]"):
        ops.scan(torch.ones(4), one_row(), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scan: carry_in: expected float32 \[1\], got float32 \[2\]"):
        ops.scan(torch.ones(4), one_row(), carry=torch.ones(2))
