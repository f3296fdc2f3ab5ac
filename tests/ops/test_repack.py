import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit import Rollouts, ops

pytestmark = pytest.mark.usefixtures("device")


def definition(x, source, target, length, size):
    y = torch.zeros(size, dtype=x.dtype)
    for s, t, n in zip(source.tolist(), target.tolist(), length.tolist(), strict=True):
        y[t : t + n] = x[s : s + n]
    return y


@st.composite
def moves(draw):
    """Rows somewhere in a buffer, and disjoint places for them in another."""
    spans = draw(ragged.spans())
    length = spans.lengths
    gaps = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=len(length) + 1, max_size=len(length) + 1)))
    target = gaps[:-1].cumsum(0) + length.cumsum(0) - length
    return spans.begin, target, length, spans.size, int(gaps.sum() + length.sum())


@given(moves(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool]))
def test_matches_definition(move, dtype):
    source, target, length, before, after = move
    x = (ragged.values(before) * 9).to(dtype)
    y = ops.repack(x, source, target, length, after)
    assert torch.equal(y, definition(x, source, target, length, after))


def test_worked_example():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    y = ops.repack(x, torch.tensor([0, 1]), torch.tensor([0, 3]), torch.tensor([1, 3]), 6)
    assert y.tolist() == [1, 0, 0, 2, 3, 4]


@given(moves())
def test_gradient(move):
    source, target, length, before, after = move
    x = ragged.values(before).requires_grad_()
    torch.autograd.gradcheck(lambda x: ops.repack(x, source, target, length, after), (x,))


@given(ragged.spans())
def test_packing_and_padding_undo_each_other(spans):
    length = spans.lengths
    edges = torch.cat([length.new_zeros(1), length.cumsum(0)])
    packed = Rollouts(torch.zeros(int(edges[-1]), dtype=torch.int64), edges, torch.zeros_like(length), length.float())
    x = ragged.values(packed.num_tokens)
    wide = packed.to_padded(x)
    real = torch.arange(wide.shape[1]) < length[:, None]
    assert torch.equal(wide[real], x) and not wide[~real].any()
    again = Rollouts.from_padded(
        torch.zeros(wide.shape, dtype=torch.int64), real, packed.group_ids, packed.rewards, attention_mask=real
    )
    assert torch.equal(again.to_packed(wide), x)


def test_opcheck_and_threads():
    x = ragged.values(300_000, torch.float32)
    source, length = torch.tensor([0, 100_000]), torch.tensor([100_000, 200_000])
    arguments = (x, source, source + 50_000, length, 400_000)
    torch.library.opcheck(torch.ops.tokcredit.repack, (*arguments, 1), test_utils=("test_schema", "test_faketensor"))
    one = torch.ops.tokcredit.repack(*arguments, 1)
    assert torch.equal(one, torch.ops.tokcredit.repack(*arguments, 7))
    assert torch.equal(one, definition(*arguments))
