import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.scan import scan as reference
from tokcredit import ops
from tokcredit.blocks import scan
from tokcredit.ops import Rows

pytestmark = pytest.mark.usefixtures("device")


def one_row():
    return Rows(torch.tensor([0]), torch.tensor([4]), torch.tensor([True, True, False, True]))


@given(ragged.rows(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1.0, 0.9, 0.0, -0.5]))
def test_matches_definition(batch, reverse, exclusive, carried, decay):
    rows, size = batch
    x = ragged.values(size)
    carry = ragged.values(len(rows.begin), seed=1) if carried else None
    y, last = ops.scan(x, rows, decay, carry, reverse, exclusive)
    expected, expected_last = reference(x, *rows, decay, carry, reverse, exclusive)
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
    rows = Rows(torch.tensor([0, 2500]), torch.tensor([2500, 5000]))
    y, _ = ops.scan(x, rows)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference(x, *rows)[0].float(), rtol=1e-6, atol=1e-5)


def test_long_row_keeps_its_digits():
    x = ragged.values(131_072, torch.float32) * 1e-2
    rows = Rows(torch.tensor([0]), torch.tensor([131_072]))
    exact = x.double().cumsum(0)
    ours = (ops.scan(x, rows)[0] - exact).abs().max()
    assert ours <= (x.cumsum(0) - exact).abs().max()
    assert ours < 1e-6 * exact.abs().max()


@given(ragged.rows(max_rows=3, max_length=4), st.booleans(), st.booleans(), st.sampled_from([1.0, 0.7, 0.0]))
def test_gradient(batch, reverse, exclusive, decay):
    rows, size = batch
    x = ragged.values(size).requires_grad_()
    carry = ragged.values(len(rows.begin), seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda x, c: ops.scan(x, rows, decay, c, reverse, exclusive), (x, carry))


def test_thread_count_does_not_change_bits(monkeypatch):
    x = ragged.values(300_000, torch.float32)
    edges = torch.arange(0, 300_001, 3000)
    rows = Rows(edges[:-1], edges[1:])
    monkeypatch.setattr(ops.call, "_threads", 1)
    one = ops.scan(x, rows, 0.99)[0]
    monkeypatch.setattr(ops.call, "_threads", 7)
    assert torch.equal(one, ops.scan(x, rows, 0.99)[0])


def test_opcheck():
    x = ragged.values(4, torch.float32)
    torch.library.opcheck(torch.ops.tokcredit.scan.default, (x, *one_row(), 0.9, torch.ones(1), True, False, 1))


def test_compiles_without_graph_breaks():
    x = ragged.values(4).requires_grad_()

    def f(x):
        return scan.cumulative(x, one_row()).square().sum()

    (eager,) = torch.autograd.grad(f(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)


@given(ragged.rows(), st.sampled_from([1.0, 0.9]), st.sampled_from([1.0, 0.5, 0.0]))
def test_generalized_advantages(batch, discount, trace):
    rows, size = batch
    rewards, values = ragged.values(size), ragged.values(size, seed=1)
    ours = scan.generalized_advantages(rewards, values, rows, discount, trace)
    for b, e in zip(rows.begin.tolist(), rows.end.tolist(), strict=True):
        after, advantage = 0.0, 0.0
        for t in reversed(range(b, e)):
            if rows.mask is not None and not rows.mask[t]:
                assert ours[t] == 0
                continue
            delta = rewards[t].item() + discount * after - values[t].item()
            advantage = delta + discount * trace * advantage
            after = values[t].item()
            assert abs(ours[t].item() - advantage) < 1e-9


def test_positions_and_returns():
    assert scan.positions(one_row(), 4).tolist() == [1, 2, 0, 3]
    assert scan.returns(torch.tensor([1.0, 0, 9, 8]), one_row(), 0.5).tolist() == [3.0, 4.0, 0.0, 8.0]


def test_rejects_wrong_arguments():
    with pytest.raises(ValueError, match="scan: mask: expected bool"):
        ops.scan(torch.ones(4), one_row()._replace(mask=torch.ones(4)))
    with pytest.raises(ValueError, match=r"scan: carry_in: expected float32 \[1\], got float32 \[2\]"):
        ops.scan(torch.ones(4), one_row(), carry=torch.ones(2))
