import math

import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.baseline import baseline as reference
from tokcredit import Spans, ops

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(size, seed=0, dtype=torch.float64):
    """Log-probs, and squares that a distribution with this probability can have."""
    u = torch.rand(2, size, dtype=torch.float64, generator=ragged.generator(seed))
    return (u[0] + 1e-3).log().clamp(max=0).to(dtype), (u[0] ** 2 + u[1] * (1 - u[0]) ** 2).to(dtype)


def rewards_of(spans, per_row, dtype=torch.float64):
    return ragged.values(spans.num_rows if per_row else spans.size, dtype, seed=3)[(...,) + (None,) * per_row]


def check(spans, group, per_row, epsilon=1e-8, dtype=torch.float64, **tolerance):
    log_probs, squares = inputs(spans.size, dtype=dtype)
    rewards = rewards_of(spans, per_row, dtype)
    ours = ops.baseline(log_probs, squares, rewards, spans, group, int(group.max()) + 1, epsilon, True)
    expected = reference(log_probs, squares, rewards, *spans.arrays, group, epsilon)
    for value, true in zip(ours, expected, strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), true, **tolerance)
    alone, none = ops.baseline(log_probs, squares, rewards, spans, group, int(group.max()) + 1, epsilon)
    assert torch.equal(alone, ours[0]) and none.shape == (0,)
    return expected


@given(ragged.spans(), st.data(), st.booleans(), st.sampled_from([1e-8, 0.5]))
def test_matches_definition(spans, data, per_row, epsilon):
    count = spans.num_rows
    # Any order, groups of one, and numbers without a row.
    group = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
    check(spans, group, per_row, epsilon)


def test_worked_example():
    rows, group = ragged.packed(2, 2), torch.tensor([0, 0])
    log_probs, squares = torch.full((4,), -math.inf), torch.ones(4)
    ours = ops.baseline(log_probs, squares, torch.tensor([0.0, 1, 0, 3]), rows, group, 1, with_returns=True)
    assert [x.tolist() for x in ours] == [[-1, -1, 1, 1], [1, 1, 3, 3]]
    # A row of thrice the energy draws the baseline three parts of four to itself.
    squares[2:] = 5
    advantages, _ = ops.baseline(log_probs, squares, torch.tensor([[1.0], [3.0]]), rows, group, 1, 0.0)
    assert advantages.tolist() == [-1.5, -1.5, 0.5, 0.5]


def test_energy_adds_up_along_the_row():
    """A certain token adds nothing to what came before it; a masked one neither."""
    rows = ragged.packed(3, 3, mask=torch.tensor([True, True, True, True, False, True]))
    log_probs, squares = torch.tensor([-math.inf, 0, 0, -math.inf, 0, 0]), torch.tensor([0.0, 1, 1, 2, 9, 1])
    advantages, _ = ops.baseline(
        log_probs, squares, torch.tensor([[0.0], [8.0]]), rows, torch.tensor([0, 0]), 1, epsilon=0.0
    )
    # Energies 1 1 1 and 3 - 3; in the middle the first row is alone.
    assert advantages.tolist() == [-6, 0, -6, 2, 0, 2]


@pytest.mark.parametrize("per_row", [False, True])
def test_a_row_alone_keeps_its_return(per_row):
    """In a group of one, and where the others have ended."""
    rows, group = ragged.packed(4, 2, 0, 3), torch.tensor([0, 0, 0, 1])
    advantages, returns = check(rows, group, per_row)
    alone = torch.tensor([False, False, True, True, False, False, True, True, True])
    assert torch.equal(advantages == returns, alone)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_one_stretch_and_two(dtype, per_row):
    rows = ragged.packed(1025, 1, 3000, 1024, 2049, 0, 64, 2048)
    size = int(rows.end[-1])
    mask = torch.rand(size, generator=ragged.generator()) > 0.3
    group = torch.tensor([1, 0, 0, 1, 0, 1, 3, 1])
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    check(rows.with_mask(mask), group, per_row, dtype=dtype, **tolerance)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nothing_under_the_mask_is_read(poison, per_row):
    mask = torch.rand(4000, generator=ragged.generator()) > 0.5
    mask[1500:2500] = False
    rows = ragged.packed(1500, 1000, 1500, mask=mask)
    arguments = [*inputs(4000), rewards_of(rows, per_row)]
    group = torch.zeros(3, dtype=torch.int64)
    clean = ops.baseline(*arguments, rows, group, 1, with_returns=True)
    dirty = [x if x.dim() == 2 else x.masked_fill(~mask, poison) for x in arguments]
    assert all(
        torch.equal(*x) for x in zip(clean, ops.baseline(*dirty, rows, group, 1, with_returns=True), strict=True)
    )
    assert clean[0][mask].any() and not clean[0][~mask].any() and not clean[1][~mask].any()


def test_padding_is_cleared():
    """Between rows, before the first and after the last, where the results' memory held something."""
    rows = Spans(torch.tensor([3, 700]), torch.tensor([600, 1300]), 2000, torch.ones(2000, dtype=torch.bool))
    padding = torch.ones(2000, dtype=torch.bool)
    padding[3:600] = padding[700:1300] = False
    for per_row in (False, True):
        for _ in range(2):
            log_probs, squares = (x.masked_fill(padding, math.nan) for x in inputs(2000))
            rewards = rewards_of(rows, per_row)
            for x in ops.baseline(log_probs, squares, rewards, rows, torch.tensor([0, 0]), 1, with_returns=True):
                assert not x[padding].any() and x[~padding].all()
                x.fill_(7.0)
            del x


def test_no_rows_and_no_tokens():
    none, no_rows = torch.zeros(0, dtype=torch.int64), ragged.packed()
    for size in (0, 5):
        log_probs, squares = inputs(size)
        for rewards in (torch.zeros(size).double(), torch.zeros(0, 1).double()):
            for x in ops.baseline(log_probs, squares, rewards, no_rows, none, 0, with_returns=True):
                assert x.tolist() == [0.0] * size
    empty = torch.zeros(0)
    for x in ops.baseline(
        empty, empty, torch.ones(2, 1), ragged.packed(0, 0), torch.tensor([0, 0]), 1, with_returns=True
    ):
        assert x.shape == (0,)


def test_rounding_cannot_take_a_baseline_out_of_its_rows():
    """Energies of nearly certain tokens are all rounding; below 0 they would cancel and leave a small divisor."""
    log_probs, squares = torch.zeros(2), torch.tensor([1 + 1.2e-7, 1 - 1.2e-7])
    rewards = torch.tensor([[0.0], [1.0]])
    advantages, _ = ops.baseline(log_probs, squares, rewards, ragged.packed(1, 1), torch.tensor([0, 0]), 1)
    assert advantages.abs().max() <= 1
    log_probs[:] = squares[:] = 1e-30
    squares += 1
    advantages, _ = ops.baseline(log_probs, squares, rewards, ragged.packed(1, 1), torch.tensor([0, 0]), 1)
    assert advantages.tolist() == [0, 1]


def test_it_has_the_least_variance():
    """Of all numbers subtracted from the rewards, weighted by energy, the mean square is least about the baseline."""
    rows, group = ragged.packed(*[1] * 50), torch.zeros(50, dtype=torch.int64)
    log_probs, squares = inputs(50)
    rewards = rewards_of(rows, True)
    weight = 1 - 2 * log_probs.exp() + squares
    advantages, _ = ops.baseline(log_probs, squares, rewards, rows, group, 1, 0.0)
    least = (weight * advantages**2).sum()
    for shift in (-0.1, 0.1):
        assert (weight * (advantages + shift) ** 2).sum() > least * (1 + 1e-4)
    assert (weight * (rewards[:, 0] - rewards.mean()) ** 2).sum() > least * (1 + 1e-4)


def test_many_rows_and_many_groups():
    lengths = torch.randint(0, 9, (3000,), generator=ragged.generator()).tolist()
    group = torch.randint(0, 900, (3000,), generator=ragged.generator(1))
    check(ragged.packed(*lengths), group, False)
    check(ragged.packed(*lengths), torch.zeros_like(group), True)


@pytest.mark.parametrize("per_row", [False, True])
def test_thread_count_does_not_change_bits(monkeypatch, per_row):
    rows = ragged.packed(*[2500] * 40, mask=torch.rand(100_000, generator=ragged.generator()) > 0.2)
    arguments = *inputs(100_000, dtype=torch.float32), rewards_of(rows, per_row, torch.float32)
    group = torch.arange(40) % 7
    results = []
    for threads in (1, 7):
        monkeypatch.setattr(ops.call, "_threads", threads)
        results.append(ops.baseline(*arguments, rows, group, 7, with_returns=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_returns", [False, True])
def test_opcheck(dtype, with_returns):
    rows = ragged.packed(3, 2, mask=torch.tensor([True, True, False, True, True]))
    for per_row in (False, True):
        arguments = *inputs(5, dtype=dtype), rewards_of(rows, per_row, dtype)
        torch.library.opcheck(
            torch.ops.tokcredit.baseline.default,
            (*arguments, *rows.arrays, torch.tensor([0, 0]), 1, 1e-8, with_returns, 1),
        )


def test_compiles_without_graph_breaks():
    rows, group = ragged.packed(3, 2), torch.tensor([0, 0])
    arguments = *inputs(5), rewards_of(rows, True)

    def f(log_probs, squares, rewards):
        advantages, returns = ops.baseline(log_probs, squares, rewards, rows, group, 1, with_returns=True)
        return advantages * 2 + returns

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), f(*arguments))


def test_rejects_wrong_arguments():
    log_probs, squares = inputs(5, dtype=torch.float32)
    rows, group = ragged.packed(3, 2), torch.tensor([0, 0])

    def fails(message, a=log_probs, b=squares, c=log_probs, by=group):
        with pytest.raises(ValueError, match=message):
            ops.baseline(a, b, c, rows, by, 1)

    fails(r"baseline: squares: expected float32 \[5\], got float64 \[5\]", b=squares.double())
    fails(r"baseline: squares: expected float32 \[5\], got float32 \[4\]", b=squares[:4])
    fails(r"baseline: rewards: expected float32 \[5\], got float32 \[2\]", c=squares[:2])
    fails(r"baseline: rewards: expected float32 \[2\], got float32 \[5, 1\]", c=squares[:, None])
    fails(r"baseline: rewards: expected float32 \[5\], got bfloat16 \[5\]", c=squares.bfloat16())
    fails(r"baseline: group: expected int64 \[2\], got int32 \[2\]", by=group.int())
    fails(r"baseline: group: expected int64 \[2\], got int64 \[1\]", by=group[:1])
    with pytest.raises(ValueError, match="baseline: mask: expected bool"):
        ops.baseline(log_probs, squares, squares, Spans.trusted(rows.begin, rows.end, 5, squares), group, 1)
    whole = torch.ones(5, dtype=torch.int64)
    fails("baseline: log_probs: expected a float dtype, got int64", a=whole, b=whole, c=whole)
