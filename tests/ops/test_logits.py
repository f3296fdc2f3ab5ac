"""The operation on rows of logits against its definition in float64: all results, settings, parts, and layouts."""

import math
import re

import pytest
import ragged
import torch
from reference.logits import every, every_gradient
from tokcredit import ops

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {
    "plain": {},
    "scale": {"scale": 0.25, "temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "all": {"softcap": 3.0, "scale": 1.5, "temperature": "each"},
}


def sample(name, dtype=torch.float64, n=6, v=1300, spread=3.0, seed=0):
    """Logits, rows, and the arguments of the definition. The chosen ids have the token, one twice, and none."""
    g = ragged.generator(seed)
    logits = (torch.randn(n, v, dtype=torch.float64, generator=g) * spread).to(dtype)
    tokens, chosen = torch.randint(0, v, (n,), generator=g), torch.randint(0, v, (n, 4), generator=g)
    tokens[1], chosen[0, 1], chosen[2, 2], chosen[:, 3] = -1, tokens[0], -1, chosen[:, 0]
    settings = dict(SETTINGS[name])
    wide = ops.accumulated(dtype)
    each = (0.5 + torch.arange(n) / 7).to(wide) if settings.get("temperature") == "each" else None
    own = settings | {"temperatures": each, "temperature": 1.0} if each is not None else settings
    definition = settings | {"chosen": chosen} | ({} if each is None else {"temperature": each})
    return logits, ops.LogitRows(tokens, chosen=chosen, **own), definition


def slopes(rows, dtype, seed=3):
    g = ragged.generator(seed)
    n, k = rows.chosen.shape
    return tuple(torch.randn(size, generator=g).to(ops.accumulated(dtype)) for size in [(n,), (n,), (n,), (n, k)])


def gradient(logits, rows, given, dtype=None, **part):
    sums = ops.logits_forward(logits, rows, squares=True)
    return ops.logits_gradient_(logits.clone(), rows, sums, given, dtype=dtype, **part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_matches_definition(name, dtype):
    logits, rows, definition = sample(name, dtype)
    found = ops.logits_forward(logits, rows, squares=True)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for a, b in zip(found, every(logits, rows.tokens, **definition), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    given = slopes(rows, dtype)
    expected = every_gradient(logits, rows.tokens, given, **definition)
    relative = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    absolute = {torch.float64: 1e-14, torch.float16: 2**-24}.get(dtype, 2e-8)
    torch.testing.assert_close(gradient(logits, rows, given).double(), expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize("output", range(4))
def test_each_gradient_alone(output):
    logits, rows, definition = sample("all", n=3, v=40)
    given = [None] * 4
    given[output] = slopes(rows, logits.dtype)[output]
    expected = every_gradient(logits, rows.tokens, given, **definition)
    torch.testing.assert_close(gradient(logits, rows, tuple(given)), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradcheck(name):
    logits, rows, _ = sample(name, n=3, v=11, spread=1.5)
    torch.autograd.gradcheck(lambda x: ops.logits(x, rows, squares=True), logits.requires_grad_())


def test_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, math.log(3)]], dtype=torch.float64)
    rows = ops.LogitRows(torch.tensor([3]), chosen=torch.tensor([[0, -1]]))
    found = ops.logits_forward(logits, rows, squares=True)
    assert found.squares.tolist() == pytest.approx([1 / 3])
    assert found.chosen.tolist() == [pytest.approx([-math.log(6), 0])]
    # d/dx_j of sum p^2 is 2 p_j (p_j - sum p^2).
    of_squares = gradient(logits, rows, (None, None, torch.ones(1, dtype=torch.float64), None))
    assert of_squares.tolist() == [pytest.approx([-1 / 18] * 3 + [1 / 6])]
    of_chosen = gradient(logits, rows, (None, None, None, torch.tensor([[1.0, 9.0]], dtype=torch.float64)))
    assert of_chosen.tolist() == [pytest.approx([5 / 6, -1 / 6, -1 / 6, -1 / 2])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1, 40, 1024, 1300, 5001])
def test_a_narrow_gradient_lies_over_the_logits(dtype, v):
    logits, rows, _ = sample("all", torch.float32, v=v)
    given = slopes(rows, torch.float32)
    wide = gradient(logits, rows, given)
    sums, own = ops.logits_forward(logits, rows, squares=True), logits.clone()
    narrow = ops.logits_gradient_(own, rows, sums, given, dtype=dtype)
    assert narrow.data_ptr() == own.data_ptr() and narrow.dtype == dtype and narrow.shape == logits.shape
    assert torch.equal(narrow, wide.to(dtype)) and wide.isfinite().all() and wide[0].any() == (v > 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(dtype, device):
    # On CUDA the place of a row in memory decides in which order its numbers are added up.
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {}
    logits, rows, _ = sample("all", dtype, v=301)
    given = slopes(rows, dtype)
    expected = ops.logits_forward(logits, rows, squares=True)
    whole = gradient(logits, rows, given)
    base = torch.full((2, 4, 310), math.nan, dtype=dtype)
    apart = base[:, 1:, 3:304].copy_(logits.view(2, 3, 301))
    wide = torch.full((6, 310), math.nan, dtype=dtype)
    columns = wide[:, :301].copy_(logits)
    for x in (apart, columns, columns.view(2, 3, 301), apart.transpose(0, 1).contiguous().transpose(0, 1)):
        for a, b in zip(ops.logits_forward(x, rows, squares=True), expected, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    for x in (apart, columns):
        found = ops.logits_gradient_(x, rows, expected, given)
        torch.testing.assert_close(found.reshape(6, 301), whole, **tolerance)
        assert found.data_ptr() == x.data_ptr()
    assert base[:, 0].isnan().all() and base[..., :3].isnan().all() and wide[:, 301:].isnan().all()


def test_rows_that_share_memory_are_copied():
    row = torch.randn(1, 9, dtype=torch.float64, generator=ragged.generator(0))
    leaf = row.clone().requires_grad_()
    rows = ops.LogitRows(torch.tensor([2, 5, 2]))
    for overwrite in (False, True):
        log_probs = ops.logits(leaf.expand(3, 9), rows, overwrite=overwrite)[0]
        expected = leaf.log_softmax(-1)[0, rows.tokens]
        torch.testing.assert_close(log_probs, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad((x * torch.arange(3)).sum(), leaf)[0] for x in (log_probs, expected))
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1300,), (500, 800), (1, 700, 0, 599)])
def test_parts_of_the_vocabulary(dtype, sizes):
    logits, rows, _ = sample("all", dtype)
    logits[3, :600] = -math.inf  # whole parts without probability
    whole, given = ops.logits_forward(logits, rows, squares=True), slopes(rows, dtype)
    states, before, first, tolerance = [], None, 0, 1e-11 if dtype == torch.float64 else 3e-6
    for part in logits.split(sizes, 1):
        states.append(ops.logits_state(part, rows, first, 1300))
        before = ops.logits_state(part, rows, first, 1300, before)
        first += part.shape[1]
    for state in (before, ops.joined_states(torch.stack(states)), ops.joined_states(torch.stack(states[::-1]))):
        sums = ops.sums_of_state(state, rows, dtype)
        for a, b in zip(sums, whole, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    expected, first = ops.logits_gradient_(logits.clone(), rows, sums, given), 0
    for part in logits.split(sizes, 1):
        found = ops.logits_gradient_(part.clone(), rows, sums, given, first=first, ids=1300)
        assert torch.equal(found, expected[:, first : first + part.shape[1]])
        first += part.shape[1]


def test_state_of_the_golden_numbers():
    z = torch.tensor([[1.876950792, 1.006016933, -2.639646015, 0.829794255]], dtype=torch.float64)
    rows = ops.LogitRows(torch.tensor([0]), chosen=torch.tensor([[1, 3]]))
    states = torch.stack([ops.logits_state(part, rows, first, 4) for first, part in ((0, z[:, :2]), (2, z[:, 2:]))])
    expected = [
        [1.876950792, 1.418560490, -0.364538503, 1.175192884, 1.876950792, 1.006016933, 0],
        [0.829794255, 1.031134453, -0.108019124, 1.000969354, 0, 0, 0.829794255],
    ]
    torch.testing.assert_close(states[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-9)
    found = ops.sums_of_state(ops.joined_states(states), rows, z.dtype)
    numbers = [[-0.57684976], [1.015718211], [0.409624201], [[-1.44778362, -1.624006297]], [2.453800552]]
    for a, b in zip(found, numbers, strict=True):
        torch.testing.assert_close(a, torch.tensor(b, dtype=torch.float64), rtol=0, atol=2e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forbidden_id_stays_forbidden_under_a_softcap(dtype):
    logits, rows, definition = sample("softcap", dtype, v=40)
    logits[:, 7] = -math.inf
    tokens, chosen = (torch.where(x == 7, 8, x) for x in (rows.tokens, rows.chosen))
    rows, definition = rows._replace(tokens=tokens, chosen=chosen), definition | {"chosen": chosen}
    found = ops.logits_forward(logits, rows, squares=True)
    for a, b in zip(found, every(logits, tokens, **definition), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=5e-6, atol=5e-6)
    grad = gradient(logits, rows, slopes(rows, dtype))
    assert (grad[:, 7] == 0).all() and grad[0].any() and grad.isfinite().all()
    alone = ops.logits_forward(logits, rows._replace(tokens=torch.full((6,), 7)))
    assert (alone.log_probs == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
def test_softcap_keeps_the_digits_of_small_and_large_logits(dtype, softcap):
    numbers = [0.0, 1e-4, -3e-4, 2e-2, 1.0, -7.0, 60.0, -200.0]
    logits = torch.tensor([numbers], dtype=torch.float64).to(dtype)
    rows = ops.LogitRows(torch.tensor([0]), softcap=softcap, chosen=torch.arange(8)[None])
    exact = (softcap * torch.tanh(logits.double() / softcap)).log_softmax(-1)
    found = ops.logits_forward(logits, rows).chosen.double()
    tolerance = 1e-13 if dtype == torch.float64 else 3e-7
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 1.0, 1.9, 5.0])
def test_the_smallest_finite_logit_stays_finite_under_a_softcap(dtype, softcap):
    logits = torch.tensor([[torch.finfo(dtype).min, 0.0, -math.inf]], dtype=dtype)
    rows = ops.LogitRows(torch.tensor([1]), softcap=softcap, chosen=torch.tensor([[0, 2]]))
    found = ops.logits_forward(logits, rows, squares=True)
    lowest = -softcap - math.log1p(math.exp(-softcap))
    assert found.chosen[0].tolist() == [pytest.approx(lowest, rel=1e-6), -math.inf]
    assert found.log_probs[0].item() == pytest.approx(lowest + softcap, rel=1e-6)
    state = ops.logits_state(logits, rows, 0, 3)
    assert ops.sums_of_state(state, rows, dtype).chosen[0, 0].item() == pytest.approx(lowest, rel=1e-6)
    grad = gradient(logits, rows, slopes(rows, dtype))
    assert grad.isfinite().all() and grad[0, 0] == grad[0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 4.0, 0.25])
def test_the_range_of_a_softcap(dtype, scale):
    """A softcap at the upper limit caps nothing; under one at the lower limit all ids are equally likely."""
    logits, rows, _ = sample("plain", dtype, v=40)
    rows = rows._replace(scale=scale)
    plain = ops.logits_forward(logits, rows, squares=True)
    low, high = 1e-20 * max(scale, 1), 1e20 * min(scale, 1)
    for found, expected in zip(ops.logits_forward(logits, rows._replace(softcap=high), True), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    given = slopes(rows, dtype)
    large = gradient(logits, rows._replace(softcap=high), given)
    torch.testing.assert_close(large, gradient(logits, rows, given), rtol=1e-4, atol=1e-5)
    small = ops.logits_forward(logits, rows._replace(softcap=low))
    taken = rows.tokens != -1
    assert small.log_probs[taken].tolist() == pytest.approx([-math.log(40)] * int(taken.sum()), rel=1e-6)
    for wrong in (high * 1.01, low * 0.99, 1e39, 1e-39):
        with pytest.raises(
            ValueError, match=re.escape(f"softcap: expected {low:g} to {high:g}, or infinity, got {wrong:g}")
        ):
            ops.logits_forward(logits, rows._replace(softcap=wrong))


def test_softcap_and_temperature_of_huge_logits_keep_their_digits():
    logits, rows, definition = sample("scale", torch.float32, v=700)
    logits += 1e4
    for a, b in zip(ops.logits_forward(logits, rows, True), every(logits, rows.tokens, **definition), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=5e-6, atol=5e-6)


def test_rows_without_incoming_gradient_are_not_read():
    logits, rows, _ = sample("all", n=4, v=20)
    logits[0], logits[1] = math.nan, math.inf
    zero = torch.zeros(4, dtype=torch.float64)
    ones = torch.ones(4, 4, dtype=torch.float64)
    ones[0] = 0
    grad = gradient(logits, rows, (zero, zero, zero, ones))
    assert (grad[:2] == 0).all() and grad[2:].abs().min() > 0
    # A gradient to what stands for no id is none.
    nothing = rows._replace(chosen=torch.full((4, 4), -1))
    assert (gradient(logits, nothing, (None, None, None, ones)) == 0).all()


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["plain", "scale"])
def test_what_is_not_a_number_reaches_all_results(name, number):
    logits, rows, _ = sample(name, torch.float32)
    logits[4, 1100] = number
    found = ops.logits_forward(logits, rows, squares=True)
    for x in found[:4]:
        assert x[4].isnan().all() and x[0].isfinite().all()
    grad = gradient(logits, rows, slopes(rows, torch.float32))
    assert grad[4].isnan().all() and grad[0].isfinite().all()


@pytest.mark.parametrize("chosen", [-2, 20, 2**40])
def test_chosen_ids_out_of_range(chosen, device):
    logits, rows, _ = sample("plain", n=4, v=20)
    rows.chosen[2, 1] = chosen
    if device == "cpu":
        with pytest.raises(ValueError, match=f"logits: chosen: expected -1 or an id below .* 20, got {chosen} at 9"):
            ops.logits_forward(logits, rows)
        return
    found = ops.logits_forward(logits, rows)
    assert found.chosen.isnan().nonzero().tolist() == [[2, 1]] and found.log_probs.isfinite().all()


def test_threads_do_not_change_bits(monkeypatch):
    logits, rows, _ = sample("all", torch.float32, n=200)
    results = []
    for threads in (1, 7):
        monkeypatch.setattr(ops.call, "_threads", threads)
        given = slopes(rows, torch.float32)
        results.append((*ops.logits_forward(logits, rows, True), gradient(logits, rows, given, torch.bfloat16)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_chosen_ids_of_no_row_and_no_ids():
    logits, rows, _ = sample("plain", n=3, v=5)
    none = rows._replace(chosen=torch.zeros(3, 0, dtype=torch.int64))
    assert ops.logits_forward(logits, none).chosen.shape == (3, 0)
    empty = ops.LogitRows(rows.tokens[:0], chosen=rows.chosen[:0])
    found = ops.logits_forward(logits[:0], empty, squares=True)
    assert [x.shape for x in found] == [(0,), (0,), (0,), (0, 4), (0,)]
