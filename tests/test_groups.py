import pytest
import ragged
import tokcredit as tc
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokcredit.blocks import segment
from tokcredit.groups import Groups
from torch.utils._python_dispatch import TorchDispatchMode

REDUCTIONS = ("sum", "mean", "var", "minimum", "maximum", "logsumexp")
ids = st.lists(st.sampled_from([7, -3, 10**12, 0]), max_size=12)


@given(ids)
def test_numbers_follow_ascending_ids(numbers):
    groups = Groups.of(torch.tensor(numbers, dtype=torch.int64))
    names = sorted(set(numbers))
    assert groups.count == len(names) and groups.index.tolist() == [names.index(x) for x in numbers]
    assert groups.sizes.tolist() == [numbers.count(x) for x in names]
    order = sorted(range(len(numbers)), key=lambda r: numbers[r])
    assert groups.sorted(torch.arange(len(numbers))).tolist() == order
    assert (groups.order is None) == (order == list(range(len(numbers))))


@given(ids, st.data())
def test_reductions_are_those_of_ids(numbers, data):
    """In any order of rows, also where some rows do not count."""
    groups = Groups.of(torch.tensor(numbers, dtype=torch.int64))
    x = ragged.values(len(numbers))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))), dtype=torch.bool)
    for by, same in (
        (groups, segment.Ids(groups.index, groups.count)),
        (groups.counting(mask), segment.Ids(groups.index, groups.count, mask)),
    ):
        assert torch.equal(segment.count(by), segment.count(same))
        for name in REDUCTIONS:
            torch.testing.assert_close(getattr(segment, name)(x, by), getattr(segment, name)(x, same))


@given(ids)
def test_gradients_are_those_of_ids(numbers):
    groups = Groups.of(torch.tensor(numbers, dtype=torch.int64))
    for name in ("sum", "mean", "logsumexp"):
        grads = []
        for by in (groups, segment.Ids(groups.index, groups.count)):
            x = ragged.values(len(numbers)).requires_grad_()
            reduced = getattr(segment, name)(x, by)
            (reduced * torch.arange(1, groups.count + 1)).sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)
        assert not numbers or grads[0].any()


def test_each_rows_number():
    groups = Groups.of(torch.tensor([5, 2, 5]))
    assert groups.per_row(torch.tensor([10.0, 20.0])).tolist() == [20.0, 10.0, 20.0]
    assert groups.per_row(torch.tensor([[1, 2], [3, 4]])).tolist() == [[3, 4], [1, 2], [3, 4]]


def test_interleaved_groups_by_hand():
    groups = Groups.of(torch.tensor([1, 0, 1, 0]))
    x = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert segment.mean(x, groups).tolist() == [6.0, 2.0]
    only = groups.counting(torch.tensor([True, True, True, False]))
    assert segment.mean(x, only).tolist() == [2.0, 2.0] and segment.count(only).tolist() == [1, 2]
    assert only.sizes.tolist() == [2, 2]


def test_moments_of_equal_numbers_are_exact():
    groups = Groups.of(torch.tensor([0, 1, 0, 0, 2]))
    x = torch.tensor([0.1, 0.3, 0.1, 0.1, 9.0], dtype=torch.float64)
    found = segment.moments(x, groups)
    assert found.size.tolist() == [3, 1, 1] and found.mean.tolist() == [0.1, 0.3, 9.0]
    assert found.var.tolist() == [0, 0, 0] and found.minimum.tolist() == found.maximum.tolist() == [0.1, 0.3, 9.0]
    empty = segment.moments(x, groups.counting(torch.tensor([True, False, True, True, False])))
    assert empty.size.tolist() == [3, 0, 0]


class Sorts(TorchDispatchMode):
    """Counts operations that sort."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("sort", "argsort", "_unique2", "unique_dim", "topk")
        return func(*args, **(kwargs or {}))


def test_a_batch_sorts_its_groups_once():
    batch = tc.Rollouts(
        torch.arange(4), torch.arange(5), torch.tensor([1, 0, 1, 0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    )
    with Sorts() as first:
        batch.groups  # noqa: B018
    assert 1 <= first.count <= 2
    with Sorts() as later:
        for name in ("grpo", "rloo", "tempo", "ba"):
            tc.methods.load(name).prepare(batch)
        assert batch.groups is batch.groups and batch.nonempty_groups is batch.nonempty_groups
    assert later.count == 0


def test_wrong_groups_are_errors():
    groups = Groups.of(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"x: expected \[2\], got float32 \[3\]"):
        segment.mean(torch.ones(3), groups)
    with pytest.raises(TypeError, match="mask: expected bool"):
        groups.counting(torch.ones(2))
    with pytest.raises(ValueError, match=r"mask: expected bool \[2\], got bool \[3\]"):
        groups.counting(torch.ones(3, dtype=torch.bool))
