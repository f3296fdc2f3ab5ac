import math

import pytest
import ragged
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.logits import logits as reference
from reference.logits import logits_gradient as reference_gradient
from tokcredit import Rollouts, ops
from tokcredit.blocks import log_probs as module

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def sample(rows, vocabulary, dtype=torch.float64, scale=3.0, seed=0):
    generator = ragged.generator(seed)
    logits = (torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def test_worked_example():
    logits = torch.tensor([[0.0, 0.0, 0.0, math.log(3.0)]])
    log_probs, entropies = module.with_entropies(logits, torch.tensor([3]))
    assert log_probs.item() == pytest.approx(math.log(1 / 2), abs=1e-7)
    assert entropies.item() == pytest.approx(math.log(6) / 2 + math.log(2) / 2, abs=1e-7)


@given(st.integers(0, 5), st.integers(1, 40), st.sampled_from([1.0, 0.6, 2.5]), st.integers(0, 99))
def test_matches_definition(rows, vocabulary, temperature, seed):
    logits, tokens = sample(rows, vocabulary, seed=seed)
    tokens[::3] = -1
    log_probs, entropies = module.with_entropies(logits, tokens, temperature)
    expected, expected_entropies = reference(logits, tokens, temperature)
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 1023, 1024, 1025, 49153])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_vocabulary_sizes(vocabulary, dtype):
    logits, tokens = sample(2, vocabulary, dtype)
    tokens[1] = vocabulary - 1
    ours = module.with_entropies(logits, tokens)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for value, expected in zip(ours, reference(logits, tokens), strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch_at_the_same_dtype(dtype, scale, temperature):
    logits, tokens = sample(64, 5000, dtype, scale)
    exact = torch.log_softmax(logits.double() / temperature, -1)
    exact_entropies = -(exact.exp() * exact).sum(-1)
    theirs = torch.log_softmax(logits / temperature, -1)
    theirs_entropies = -(theirs.exp() * theirs).sum(-1)
    log_probs, entropies = module.with_entropies(logits, tokens, temperature)
    at = tokens[:, None]
    floor = 1e-6  # a few float32 roundings of numbers around 10
    error = (log_probs - exact.gather(1, at)[:, 0]).abs().max()
    assert error <= max(floor, (theirs - exact).gather(1, at).abs().max())
    error = (entropies - exact_entropies).abs().max()
    assert error <= max(floor, (theirs_entropies - exact_entropies).abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(temperature):
    logits, tokens = sample(4, 19, scale=1.5)
    tokens[2] = -1
    logits.requires_grad_()
    torch.autograd.gradcheck(lambda x: module.with_entropies(x, tokens, temperature), logits)
    torch.autograd.gradcheck(lambda x: module.from_logits(x, tokens, temperature), logits)
    torch.autograd.gradcheck(lambda x: module.with_entropies(x, tokens, temperature)[1], logits)


@pytest.mark.parametrize("outputs", ["both", "log_probs", "entropies"])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)],
)
def test_gradient_matches_definition(dtype, rtol, outputs):
    logits, tokens = sample(5, 1100, dtype)
    tokens[1] = -1
    logits.requires_grad_()
    ours = module.with_entropies(logits, tokens, 0.8)
    a, h = (torch.randn(5, generator=ragged.generator(s)).to(ours[0].dtype) for s in (1, 2))
    if outputs == "log_probs":
        h = torch.zeros_like(h)
        (grad,) = torch.autograd.grad(ours[0], logits, a)
    elif outputs == "entropies":
        a = torch.zeros_like(a)
        (grad,) = torch.autograd.grad(ours[1], logits, h)
    else:
        (grad,) = torch.autograd.grad(ours, logits, (a, h))
    expected = reference_gradient(logits.detach(), tokens, a, h, 0.8)
    assert grad.dtype == dtype
    atol = {torch.float64: 1e-15, torch.float16: 2**-25}.get(dtype, 1e-8)
    torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=atol)
    assert not grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradient_may_overwrite_the_logits(dtype):
    values, tokens = sample(5, 1100, dtype)
    tokens[1] = -1
    leaf = values.clone().requires_grad_()
    expected = torch.autograd.grad(module.from_logits(leaf, tokens, 0.8).sum(), leaf)[0]
    leaf = values.clone().requires_grad_()
    logits = leaf * 1
    places = []
    logits.register_hook(lambda grad: places.append(grad.data_ptr()))
    ours, _ = module.with_entropies(logits, tokens, 0.8, overwrite=True)
    (grad,) = torch.autograd.grad(ours.sum(), leaf, retain_graph=True)
    assert places == [logits.data_ptr()]
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ours.sum(), leaf)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_minus_infinity_is_probability_zero(dtype):
    logits = torch.tensor([[0.0, -INF, 1.0, -INF], [-INF, -INF, 5.0, -INF]], dtype=dtype, requires_grad=True)
    tokens = torch.tensor([2, 2])
    log_probs, entropies = module.with_entropies(logits, tokens)
    expected, expected_entropies = reference(logits.detach(), tokens)
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(entropies.double(), expected_entropies, rtol=1e-6, atol=1e-7)
    assert entropies[1] == 0
    (log_probs.sum() + entropies.sum()).backward()
    assert (logits.grad[logits.detach() == -INF] == 0).all()
    assert logits.grad[0, 2] != 0
    assert not logits.grad[1].any()
    # The chosen token itself may be impossible.
    assert module.from_logits(logits, torch.tensor([1, 0])).tolist() == [-INF, -INF]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_huge_logits(dtype, offset):
    logits, tokens = sample(6, 700, dtype)
    logits = (logits + offset).requires_grad_()
    ours = module.with_entropies(logits, tokens, 0.7)
    tolerance = 1e-10 if dtype == torch.float64 else 3e-6
    for value, expected in zip(ours, reference(logits.detach(), tokens, 0.7), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    ones = torch.ones(6, dtype=dtype)
    (grad,) = torch.autograd.grad(ours, logits, (ones, ones))
    expected = reference_gradient(logits.detach(), tokens, ones, ones, 0.7)
    torch.testing.assert_close(grad.double(), expected, rtol=10 * tolerance, atol=tolerance / 100)


def test_spread_of_twenty_thousand():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    log_probs, entropies = module.with_entropies(logits, torch.tensor([1]))
    assert (log_probs.item(), entropies.item()) == (-2e4, 0.0)
    log_probs.sum().backward()
    assert logits.grad.tolist() == [[-1.0, 1.0, 0.0]]


def test_one_token_vocabulary_is_certain():
    logits = torch.tensor([[7.5], [-3.0]], requires_grad=True)
    log_probs, entropies = module.with_entropies(logits, torch.tensor([0, 0]), 0.3)
    assert log_probs.tolist() == [0.0, 0.0]
    assert entropies.tolist() == [0.0, 0.0]
    (log_probs + entropies).sum().backward()
    assert logits.grad.abs().max() < 1e-6


def test_gradient_near_certainty_keeps_its_digits():
    logits = torch.tensor([[20.0, 0.0]], requires_grad=True)
    module.from_logits(logits, torch.tensor([0])).backward()
    assert logits.grad[0, 0].item() == pytest.approx(1 / (1 + math.exp(20)), rel=1e-6)


def test_log_prob_and_entropy_near_certainty_keep_their_digits():
    """Summed in float32 with the 1 among them, the other terms would lose all."""
    logits = torch.tensor([[0.0, -20.0, -21.0]])
    log_probs, entropies = module.with_entropies(logits, torch.tensor([0]))
    expected, entropy = reference(logits, torch.tensor([0]))
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(entropies.double(), entropy, rtol=1e-5, atol=0)


def test_no_rows():
    logits = torch.zeros(0, 7, requires_grad=True)
    log_probs, entropies = module.with_entropies(logits, torch.zeros(0, dtype=torch.int64))
    assert log_probs.tolist() == entropies.tolist() == []
    (log_probs.sum() + entropies.sum()).backward()
    assert logits.grad.shape == (0, 7)


def test_ignored_rows_may_hold_anything():
    logits = torch.tensor([[math.nan, 1.0], [1.0, 2.0], [INF, math.nan]], requires_grad=True)
    log_probs, entropies = module.with_entropies(logits, torch.tensor([-1, 0, -1]))
    assert log_probs[::2].tolist() == entropies[::2].tolist() == [0.0, 0.0]
    (log_probs + entropies).sum().backward()
    assert logits.grad[::2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert logits.grad[1].abs().min() > 0.05


def test_nan_under_a_zero_gradient_does_not_leak():
    logits = torch.tensor([[math.nan, 1.0], [1.0, 2.0]], requires_grad=True)
    log_probs = module.from_logits(logits, torch.tensor([0, 0]))
    assert log_probs[0].isnan()
    log_probs.backward(torch.tensor([0.0, 1.0]))
    assert logits.grad[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(logits.grad[1, 0].item(), 1 / (1 + math.exp(-1)), rtol=1e-6, atol=0)


def test_nan_is_not_hidden():
    logits = torch.zeros(3, 40)
    logits[0, 33], logits[1, 2], logits[2] = math.nan, INF, -INF
    log_probs, entropies = module.with_entropies(logits, torch.tensor([0, 0, 0]))
    assert log_probs[[0, 2]].isnan().all()
    assert entropies.isnan().all()


def test_shapes_layouts_and_int32_tokens():
    logits, tokens = sample(24, 9)
    plain = module.with_entropies(logits, tokens)
    shaped = module.with_entropies(logits.view(2, 3, 4, 9), tokens.view(2, 3, 4).int())
    swapped = module.with_entropies(logits.t().contiguous().t(), tokens)
    for a, b, c in zip(plain, shaped, swapped, strict=True):
        assert b.shape == (2, 3, 4)
        assert torch.equal(a, b.flatten())
        assert torch.equal(a, c)
    strided = logits.view(4, 6, 9).requires_grad_()
    expected = torch.log_softmax(strided[:, :-1], -1).gather(-1, tokens.view(4, 6)[:, :-1, None])[..., 0]
    ours = module.from_logits(strided[:, :-1], tokens.view(4, 6)[:, :-1])
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.square().sum(), strided)[0] for x in (ours, expected)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_thread_count_does_not_change_bits(dtype, monkeypatch):
    logits, tokens = sample(300, 1500, dtype)
    logits.requires_grad_()
    results = []
    for threads in (1, 7):
        monkeypatch.setattr(ops.call, "_threads", threads)
        log_probs, entropies = module.with_entropies(logits, tokens)
        (grad,) = torch.autograd.grad((log_probs * entropies).sum(), logits)
        results.append((log_probs, entropies, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    logits, tokens = sample(3, 5, dtype)
    chosen = torch.tensor([[0, -1], [4, 4], [1, 2]])
    rows = (tokens, 0.7, torch.full((3,), 0.6), 1.5, 4.0, chosen)
    torch.library.opcheck(torch.ops.tokcredit.logits.default, (logits, *rows, True, 1))
    torch.library.opcheck(torch.ops.tokcredit.logits.default, (logits, tokens, 0.7, None, 1.0, INF, None, False, 1))
    torch.library.opcheck(torch.ops.tokcredit.logits_state.default, (logits, *rows, 2, 9, None, 1))
    _, entropies, squares, _, logsumexp = torch.ops.tokcredit.logits(logits, *rows, True, 1)
    given = (logsumexp, entropies, squares, torch.ones(3), None, torch.ones(3), torch.ones(3, 2))
    torch.library.opcheck(torch.ops.tokcredit.logits_gradient.default, (logits, *rows, 0, 5, *given, 1))
    for narrow in {dtype, torch.bfloat16}:
        torch.library.opcheck(
            torch.ops.tokcredit.logits_gradient_.default, (logits.clone(), *rows, 0, 5, *given, narrow, 1)
        )


def test_compiles_without_graph_breaks():
    logits, tokens = sample(6, 11)
    logits = logits.view(2, 3, 11).requires_grad_()

    def f(x):
        log_probs, entropies = module.with_entropies(x, tokens.view(2, 3), 0.9)
        return (log_probs.square() + 0.1 * entropies).sum()

    (eager,) = torch.autograd.grad(f(logits), logits)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    (through,) = torch.autograd.grad(compiled(logits), logits)
    torch.testing.assert_close(through, eager, rtol=0, atol=0)


@pytest.mark.parametrize("token", [-2, 4, 2**40])
def test_tokens_out_of_range(token, device):
    """An error; on CUDA, where that would mean to wait for the device, NaN in that row alone."""
    if device == "cuda":
        logits = torch.zeros(2, 4, requires_grad=True)
        log_probs, entropies = module.with_entropies(logits, torch.tensor([0, token]))
        assert not log_probs[0].isnan() and log_probs[1].isnan() and entropies[1].isnan()
        log_probs.sum().backward()
        assert not logits.grad[0].isnan().any() and logits.grad[1].isnan().all()
        return
    with pytest.raises(ValueError, match=rf"logits: tokens: expected -1 or an id below .* 4, got {token} at 1"):
        module.from_logits(torch.zeros(2, 4), torch.tensor([0, token]))


def test_rejects_wrong_arguments():
    logits, tokens = sample(3, 4)
    with pytest.raises(ValueError, match=r"tokens: expected the shape of logits without V, \[3\], got \[2\]"):
        module.from_logits(logits, tokens[:2])
    with pytest.raises(ValueError, match=r"tokens: expected the shape of logits without V, \[3\], got \[2\]"):
        module.squared_probs(logits, tokens[:2])
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        module.from_logits(logits, tokens, 0.0)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got nan"):
        module.from_logits(logits, tokens, math.nan)
    with pytest.raises(TypeError, match=r"logits: expected a float dtype, got int64"):
        module.from_logits(tokens[:, None], tokens)
    with pytest.raises(TypeError, match="tokens: expected int32 or int64"):
        module.from_logits(logits, tokens.float())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_squared_probs(dtype, scale, temperature):
    logits, tokens = sample(64, 3000, dtype, min(scale, 1e4 if dtype != torch.float16 else 9e3))
    exact = torch.softmax(logits.double() / temperature, -1).square().sum(-1)
    ours = module.squared_probs(logits, tokens, temperature)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-11 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=0)


def test_squared_probs_by_hand():
    """Of even choices, of a certain one, of one among impossible ones, and of none."""
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [1e4, -1e4, 0.0, 0.0], [-INF, 0.0, math.log(3.0), -INF], [math.nan] * 4]
    )
    ours = module.squared_probs(logits, torch.tensor([3, 1, 0, -1], dtype=torch.int32))
    assert ours.tolist() == pytest.approx([1 / 4, 1, 1 / 16 + 9 / 16, 0])
    assert module.squared_probs(logits[None, 2:3], torch.tensor([[1]]), 0.5).tolist() == [[pytest.approx(0.01 + 0.81)]]
    assert module.squared_probs(logits[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_squared_probs_have_no_gradient_and_do_not_copy_the_logits(device):
    logits, tokens = sample(8, 50, torch.bfloat16)
    assert not module.squared_probs(logits.requires_grad_(), tokens).requires_grad
    if device == "cpu":
        from torch.utils._python_dispatch import TorchDispatchMode

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                made.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if x.data_ptr() != at)
                return out

        made, at = [], logits.data_ptr()
        with Sizes():
            module.squared_probs(logits, tokens)
        assert made and max(made) == 8


def test_no_vocabulary(device):
    if device == "cuda":
        assert module.from_logits(torch.zeros(1, 0), torch.tensor([0])).isnan()
        return
    with pytest.raises(ValueError, match=r"logits: tokens: expected -1 or an id below the vocabulary of 0"):
        module.from_logits(torch.zeros(1, 0), torch.tensor([0]))


def test_second_derivative_is_refused():
    logits, tokens = sample(2, 5)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(module.from_logits(logits, tokens).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def group_batch():
    """Two groups; tokens 4 and 1 occur in the first, 2 and 9 in the second; one token is masked."""
    return Rollouts(
        torch.tensor([4, 1, 4, 2, 9, 7]),
        torch.tensor([0, 2, 3, 6]),
        torch.tensor([0, 0, 1]),
        torch.zeros(3),
        torch.tensor([True, True, True, True, True, False]),
    )


def test_vocabulary_of_groups():
    ids, column = module.group_vocabulary(group_batch())
    assert ids.tolist() == [[1, 4], [2, 9]] and column.tolist() == [1, 0, 1, 0, 1, -1]
    smaller = group_batch().with_mask(torch.tensor([True, False, True, True, True, False]))
    assert module.group_vocabulary(smaller)[0].tolist() == [[4, -1], [2, 9]]


def test_probabilities_of_the_tokens_of_a_group():
    batch = group_batch()
    logits, _ = sample(6, 10)
    exact = torch.softmax(logits, -1)
    ours = module.group_probs(logits, batch)
    for t, names in enumerate([[1, 4]] * 3 + [[2, 9]] * 2):
        torch.testing.assert_close(ours[t], exact[t, names])
    assert ours[5].tolist() == [0, 0]
    torch.testing.assert_close(module.normalizers(logits, batch)[:5], logits[:5].logsumexp(-1))
    assert module.normalizers(logits, batch)[5] == 0
