"""The output layer against its definition in float64: golden numbers, tiles, padding, NaN, dtypes, errors."""

import math

import pytest
import torch
from tokcredit.blocks import head

pytestmark = pytest.mark.usefixtures("device")


def t(x):
    return torch.tensor(x, dtype=torch.float64)


def example():
    hidden = t([[1, -1], [0.5, 2], [-1, 0.5]])
    weight = t([[0.5, -0.5], [1, 0.25], [-0.75, 1], [0.25, 0.1]])
    return hidden, weight, t([0.1, -0.2, 0, 0.3]), torch.tensor([0, 2, -1])


def naive(hidden, weight, tokens, bias=None, temperature=1.0, softcap=None, scale=1.0, vocabulary=None):
    """The definition, with all logits at once. Positions without a token are taken out."""
    rows = (tokens >= 0).nonzero()[:, 0]
    x = hidden[rows] @ weight.t()
    x = scale * (x if bias is None else x + bias)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    x = x / (temperature[rows, None] if isinstance(temperature, torch.Tensor) else temperature)
    x = x[:, :vocabulary]
    log_p = x.log_softmax(-1)
    log_probs = hidden.new_zeros(len(tokens)).index_copy(0, rows, log_p.gather(1, tokens[rows, None])[:, 0])
    terms = torch.where(log_p > -math.inf, log_p.exp() * log_p, 0)
    return log_probs, hidden.new_zeros(len(tokens)).index_copy(0, rows, -terms.sum(-1))


def random(n=11, d=5, v=13, seed=0, dtype=torch.float64):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    hidden, weight = (torch.randn(size, d, generator=g, dtype=torch.float64).to(dtype) for size in (n, v))
    bias = torch.randn(v, generator=g, dtype=torch.float64).to(dtype)
    tokens = torch.randint(0, v, (n,), generator=g)
    tokens[::4] = -1
    return hidden, weight, bias, tokens


def gradients(f, *leaves):
    """Gradients of a weighted sum of log-probs and entropies."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    log_probs, entropies = f(*leaves)
    at = torch.arange(len(log_probs), dtype=log_probs.dtype)
    return torch.autograd.grad((log_probs * (at - 3)).sum() + (entropies * (at * 0.3 - 1)).sum(), leaves)


def test_golden_numbers():
    hidden, weight, bias, tokens = example()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    settings = {"temperature": 0.8, "softcap": 3.0, "scale": 1.5}
    log_probs, entropies = head.log_probs_and_entropies(hidden, weight, tokens, bias, **settings)
    torch.testing.assert_close(log_probs, t([-0.57684976, -0.477468955, 0]), rtol=0, atol=1e-8)
    torch.testing.assert_close(entropies, t([1.015718211, 0.977112496, 0]), rtol=0, atol=1e-8)
    loss = (log_probs[:2] * t([0.7, -0.4])).sum() + (entropies[:2] * t([0.2, 0.1])).sum()
    expected = (
        [[-0.121369234, -0.263360764], [0.33660877, -0.146561183], [0, 0]],
        [
            [0.371290413, -0.324375518],
            [-0.174279316, 0.55788704],
            [-0.093580019, -0.377673936],
            [-0.138463015, 0.462528162],
        ],
        [0.380673391, -0.097557771, -0.18783081, -0.073649986],
    )
    for found, numbers in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(found, t(numbers), rtol=0, atol=1e-8)


def test_golden_numbers_of_squares_and_chosen_ids():
    hidden, weight, bias, tokens = example()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    settings = {"temperature": 0.8, "softcap": 3.0, "scale": 1.5}
    chosen = torch.tensor([1, 3], dtype=torch.int32)
    found = head.log_probs_and_entropies(hidden, weight, tokens, bias, squares=True, chosen=chosen, **settings)
    expected = [
        [-0.57684976, -0.477468955, 0],
        [1.015718211, 0.977112496, 0],
        [0.409624201, 0.452772179, 0],
        [[-1.44778362, -1.624006297], [-1.568786875, -1.858433998], [0, 0]],
    ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, t(b), rtol=0, atol=1e-8)
    given = [[0.7, -0.4, 9], [0.2, 0.1, 9], [0.3, 0, 9], [[0.5, -0.2], [0, 0.1], [9, 9]]]
    loss = sum((a * t(b)).sum() for a, b in zip(found, given, strict=True))
    expected = (
        [[0.376342735, -0.058687861], [0.385790784, -0.20318587], [0, 0]],
        [
            [0.205201024, -0.164807466],
            [0.513481104, -0.213417572],
            [-0.128702434, -0.502428672],
            [-0.573481258, 1.256954537],
        ],
        [0.213279736, 0.573493811, -0.254928655, -0.436786602],
    )
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, t(b), rtol=0, atol=1e-8)


@pytest.mark.parametrize("tile_bytes", [None, 8 * 13 * 3])
def test_squares_and_chosen_ids_at_each_position(tile_bytes):
    hidden, weight, bias, tokens = random(12)
    g = torch.Generator(torch.get_default_device()).manual_seed(1)
    chosen = torch.randint(0, 13, (3, 4, 3), generator=g)
    chosen[0, 1, 2] = -1
    weights = torch.randn(12, 5, generator=g, dtype=torch.float64)
    weights[::3] = 0  # not computed again in the backward pass

    def ours(hidden, weight, bias):
        arguments = {"squares": True, "chosen": chosen, "tile_bytes": tile_bytes}
        found = head.log_probs_and_entropies(hidden.view(3, 4, 5), weight, tokens.view(3, 4), bias, **arguments)
        return torch.cat([found[0].reshape(12, 1), found[2].reshape(12, 1), found[3].reshape(12, 3)], 1)

    def expected(hidden, weight, bias):
        log_p = (hidden @ weight.t() + bias).log_softmax(-1)
        ids = chosen.view(12, 3)
        of_chosen = torch.where(ids >= 0, log_p.gather(1, ids.clamp(min=0)), 0)
        own = log_p.gather(1, tokens.clamp(min=0)[:, None])
        found = torch.cat([own, log_p.exp().square().sum(1, keepdim=True), of_chosen], 1)
        return torch.where(tokens[:, None] >= 0, found, 0)

    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    results = [(x := f(*leaves), *torch.autograd.grad((x * weights).sum(), leaves)) for f in (ours, expected)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_results_are_those_that_are_asked_for():
    hidden, weight, bias, tokens = random()
    for n in (11, 0):
        arguments = (hidden[:n], weight, tokens[:n], bias)
        assert [x.shape for x in head.log_probs_and_entropies(*arguments)] == [(n,)] * 2
        assert [x.shape for x in head.log_probs_and_entropies(*arguments, squares=True)] == [(n,)] * 3
        chosen = torch.tensor([2, 5, -1])
        found = head.log_probs_and_entropies(*arguments, chosen=chosen)
        assert [x.shape for x in found] == [(n,), (n,), (n, 3)] and (found[2][:, 2] == 0).all()
        assert head.log_probs_and_entropies(*arguments, chosen=chosen[:0])[2].shape == (n, 0)


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"softcap": 2.0, "scale": 0.5},
    {"vocabulary": 9},
    {"temperature": "each", "softcap": 5.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tile_bytes", [None, 1, 8 * 13 * 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_definition(settings, tile_bytes, with_bias):
    hidden, weight, bias, tokens = random()
    if settings.get("temperature") == "each":
        settings = {**settings, "temperature": 0.5 + torch.arange(len(tokens), dtype=torch.float64) / 7}
    if "vocabulary" in settings:
        tokens = tokens.clamp(max=settings["vocabulary"] - 1)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)

    def ours(hidden, weight, bias=None):
        return head.log_probs_and_entropies(hidden, weight, tokens, bias, tile_bytes=tile_bytes, **settings)

    def expected(hidden, weight, bias=None):
        return naive(hidden, weight, tokens, bias, **settings)

    found = (*ours(*leaves), *gradients(ours, *leaves))
    for a, b in zip(found, (*expected(*leaves), *gradients(expected, *leaves)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_only_positions_with_a_gradient_are_computed_again(monkeypatch):
    hidden, weight, _, tokens = random(40)
    seen = []
    original = head.Tiles.logits
    monkeypatch.setattr(
        head.Tiles, "logits", lambda self, low, high: seen.append(high - low) or original(self, low, high)
    )
    hidden.requires_grad_()
    log_probs, _ = head.log_probs_and_entropies(hidden, weight, tokens)
    forward = sum(seen)
    weights = torch.zeros(40, dtype=torch.float64)
    weights[[1, 2, 3]] = 1.0
    (log_probs * weights).sum().backward()
    assert (forward, sum(seen) - forward) == (30, 3)
    (expected,) = torch.autograd.grad((naive(hidden, weight, tokens)[0] * weights).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected)


def test_nothing_under_a_missing_token_reaches_the_weight():
    hidden, weight, bias, tokens = random()
    clean = gradients(lambda h, w, b: head.log_probs_and_entropies(h, w, tokens, b), hidden, weight, bias)
    hidden[tokens < 0] = math.nan
    found = gradients(lambda h, w, b: head.log_probs_and_entropies(h, w, tokens, b), hidden, weight, bias)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)


def test_nan_at_a_position_that_counts_reaches_everything():
    hidden, weight, bias, tokens = random()
    hidden[1] = math.nan
    log_probs, entropies = head.log_probs_and_entropies(hidden, weight, tokens, bias)
    assert log_probs.isnan().nonzero().tolist() == entropies.isnan().nonzero().tolist() == [[1]]
    of_hidden, of_weight, of_bias = gradients(
        lambda h, w, b: head.log_probs_and_entropies(h, w, tokens, b), hidden, weight, bias
    )
    assert of_hidden.isnan().any(1).nonzero().tolist() == [[1]] and of_weight.isnan().all() and of_bias.isnan().all()


def test_a_forbidden_id_has_no_gradient():
    hidden, weight, bias, tokens = random()
    bias[4] = -math.inf
    tokens[tokens == 4] = 5
    others = torch.arange(13) != 4
    of_hidden, of_weight = gradients(lambda h, w: head.log_probs_and_entropies(h, w, tokens, bias), hidden, weight)
    assert (of_weight[4] == 0).all()
    # As if there was no such id.
    expected = gradients(lambda h, w: naive(h, w, tokens - (tokens > 4).long(), bias[others]), hidden, weight[others])
    torch.testing.assert_close((of_hidden, of_weight[others]), expected)


@pytest.mark.parametrize("n", [0, 3])
def test_no_position_is_attached_to_the_graph(n):
    hidden, weight, bias, _ = random(n)
    hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    log_probs, entropies = head.log_probs_and_entropies(hidden, weight, torch.full((n,), -1), bias)
    (log_probs.sum() + entropies.sum()).backward()
    assert log_probs.tolist() == entropies.tolist() == [0.0] * n
    for x in (hidden, weight, bias):
        assert x.grad.shape == x.shape and (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    """Results are float32; gradients have the dtype of what they belong to."""
    hidden, weight, bias, tokens = random(60, 8, 50, dtype=dtype)
    exact = [x.double() for x in (hidden, weight, bias)]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 0.2}
    log_probs, entropies = head.log_probs_and_entropies(hidden, weight, tokens, bias)
    assert log_probs.dtype == entropies.dtype == torch.float32
    for a, b in zip((log_probs, entropies), naive(exact[0], exact[1], tokens, exact[2]), strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)
    if dtype == torch.bfloat16:
        wide, _ = head.log_probs_and_entropies(hidden, weight, tokens, bias, logits_dtype=torch.float32)
        torch.testing.assert_close(wide.double(), naive(*exact[:2], tokens, exact[2])[0], rtol=1e-5, atol=1e-5)
    for tile_bytes in (None, 2000):
        settings = {"tile_bytes": tile_bytes, "logits_dtype": torch.float32}

        def wide_tiles(hidden, weight, bias, settings=settings):
            return head.log_probs_and_entropies(hidden, weight, tokens, bias, **settings)

        ours = gradients(wide_tiles, hidden, weight, bias)
        expected = gradients(lambda h, w, b: naive(h, w, tokens, b), *exact)
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= (1e-5 if dtype == torch.float32 else 8e-3) * b.norm()


def test_frozen_weight_and_tied_weight():
    hidden, weight, _, tokens = random()
    frozen = gradients(lambda h: head.log_probs_and_entropies(h, weight, tokens), hidden)
    torch.testing.assert_close(frozen, gradients(lambda h: naive(h, weight, tokens), hidden))
    ids = torch.arange(len(tokens)) % len(weight)

    def tied(layer):
        def f(weight):
            return layer(weight[ids], weight, tokens)

        return gradients(f, weight)

    torch.testing.assert_close(tied(head.log_probs_and_entropies), tied(naive))


def test_autocast():
    hidden, weight, bias, tokens = random(dtype=torch.float32)
    kind = hidden.device.type
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast(kind, dtype=torch.bfloat16):
        found = head.log_probs_and_entropies(hidden, weight, tokens, bias)
    expected = head.log_probs_and_entropies(hidden.bfloat16(), weight.bfloat16(), tokens, bias.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found[0].sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in leaves)


def test_shapes_and_given_rows():
    hidden, weight, bias, tokens = random(12)
    flat = head.log_probs_and_entropies(hidden, weight, tokens, bias)
    shaped = head.log_probs_and_entropies(hidden.view(3, 4, 5), weight, tokens.view(3, 4).int(), bias)
    rows = head.log_probs_and_entropies(hidden, weight, tokens, bias, rows=(tokens >= 0).nonzero()[:, 0])
    for a, b, c in zip(flat, shaped, rows, strict=True):
        assert torch.equal(a, b.view(12)) and torch.equal(a, c) and b.shape == (3, 4)


def test_second_derivative_is_refused():
    hidden, weight, _, tokens = random()
    hidden.requires_grad_()
    log_probs, _ = head.log_probs_and_entropies(hidden, weight, tokens)
    (grad,) = torch.autograd.grad((log_probs**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"hidden": torch.zeros(3, 3)}, r"hidden: expected \[3, 2\]"),
        (TypeError, {"hidden": torch.zeros(3, 2)}, "hidden: expected torch.float64"),
        (TypeError, {"hidden": torch.zeros(3, 2, dtype=torch.int64)}, "hidden: expected a float tensor"),
        (ValueError, {"weight": torch.zeros(4)}, r"weight: expected float \[V, d\]"),
        (ValueError, {"bias": torch.zeros(3, dtype=torch.float64)}, r"bias: expected float64 \[4\]"),
        (TypeError, {"bias": torch.zeros(4)}, "bias: expected float64"),
        (TypeError, {"tokens": torch.zeros(3)}, "tokens: expected int32 or int64"),
        (ValueError, {"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        (ValueError, {"temperature": torch.ones(2)}, r"temperature: expected a number or \[3\]"),
        (ValueError, {"softcap": -1.0}, "softcap: expected a positive number"),
        (ValueError, {"softcap": 1e39}, r"softcap: expected None or 1e-20 to 1e\+20 at this scale, got 1e\+39"),
        (ValueError, {"softcap": 1e-20, "scale": 2.0}, r"softcap: expected None or 2e-20 to 1e\+20 at this scale"),
        (ValueError, {"scale": math.nan}, "scale: expected a positive number"),
        (TypeError, {"softcap": torch.ones(4)}, r"softcap: expected a positive number, got float32 \[4\]"),
        (TypeError, {"temperature": None}, "temperature: expected a positive number, got NoneType"),
        (ValueError, {"temperature": torch.ones(3, requires_grad=True)}, "temperature: expected a tensor without grad"),
        (TypeError, {"logits_dtype": torch.float32}, "logits_dtype: expected torch.float64 for this weight"),
        (ValueError, {"vocabulary": 5}, "vocabulary: expected 1 to 4"),
        (ValueError, {"tile_bytes": 0}, "tile_bytes"),
        (TypeError, {"chosen": torch.zeros(2)}, "chosen: expected int32 or int64"),
        (TypeError, {"chosen": 3}, "chosen: expected torch.Tensor, got int"),
        (TypeError, {"rows": [0, 1]}, "rows: expected torch.Tensor, got list"),
        (TypeError, {"squares": torch.ones(3)}, r"squares: expected True or False, got float32 \[3\]"),
        (ValueError, {"chosen": torch.zeros(2, 5, dtype=torch.long)}, r"chosen: expected int32 or int64 \[3, 5\]"),
        (ValueError, {"chosen": torch.zeros((), dtype=torch.long)}, r"chosen: expected int32 or int64 \[1\]"),
        (TypeError, {"unknown": 1}, "unknown"),
    ],
)
def test_errors(error, change, message):
    hidden, weight, bias, tokens = example()
    arguments = {"hidden": hidden, "weight": weight, "tokens": tokens, "bias": bias}
    device = hidden.device
    change = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(error, match=message):
        head.log_probs_and_entropies(**arguments | change)


def test_half_precision_with_a_scaled_loss():
    """The factor of a gradient scaler reaches float16 gradients before they are rounded."""
    hidden, weight, _, tokens = random(50, 8, 400, dtype=torch.float16)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    log_probs, _ = head.log_probs_and_entropies(*leaves, tokens)
    found = torch.autograd.grad(log_probs.mean() * 2e-4 * 2**16, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(naive(*exact, tokens)[0].mean() * 2e-4 * 2**16, exact)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 5e-3 * b.norm()


def test_confident_tokens_keep_their_gradient():
    """Where p is close to 1 the gradient comes from 1 - p, which bfloat16 cannot tell from 0 after p is rounded."""
    hidden, weight, _, _ = random(40, 8, 30, dtype=torch.bfloat16)
    hidden *= 6
    tokens = (hidden.float() @ weight.float().t()).argmax(1)
    exact = [x.double() for x in (hidden, weight)]
    sure = naive(*exact, tokens)[0] > math.log(0.99)
    tokens = tokens.masked_fill(~sure, -1)
    assert int(sure.sum()) > 10
    settings = {"logits_dtype": torch.float32}
    ours = gradients(lambda h, w: head.log_probs_and_entropies(h, w, tokens, **settings), hidden, weight)
    for a, b in zip(ours, gradients(lambda h, w: naive(h, w, tokens), *exact), strict=True):
        assert (a.double() - b).norm() <= 8e-3 * b.norm()


def test_a_forbidden_id_under_a_softcap_has_probability_0():
    hidden, weight, bias, tokens = random()
    bias[4] = -math.inf
    tokens[tokens == 4] = 5
    others = torch.arange(13) != 4
    ours = head.log_probs_and_entropies(hidden, weight, tokens, bias, softcap=2.0)
    expected = naive(hidden, weight[others], tokens - (tokens > 4).long(), bias[others], softcap=2.0)
    torch.testing.assert_close(ours, expected)


def test_a_tile_is_let_go_after_its_pass():
    hidden, weight, _, tokens = random()
    tokens = tokens.abs()
    hidden.requires_grad_()
    log_probs, _ = head.log_probs_and_entropies(hidden, weight, tokens)
    tiles = log_probs.grad_fn.next_functions[0][0].next_functions
    made = [x for x, _ in tiles if hasattr(x, "tiles")]
    assert len(made) == 1 and made[0].tiles.memory is None
    log_probs.sum().backward(retain_graph=True)
    assert made[0].tiles.memory is None and made[0].tiles.operand is None
