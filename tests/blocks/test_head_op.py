"""Under ``torch.compile`` the output layer gives what it gives without: results and gradients."""

import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.blocks import head_op

V, D = 13, 5


def layer(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    made = (torch.randn(size, generator=g).to(dtype) for size in ((4, 6, D), (V, D), (V,)))
    hidden, weight, bias = (x.requires_grad_() for x in made)
    tokens = torch.randint(0, V, (4, 6), generator=g)
    tokens[:, ::4] = -1
    return hidden, weight, bias, tokens


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def gradients(f, *leaves):
    found = f(*leaves)
    weights = [torch.linspace(-1, k, x.numel(), dtype=x.dtype).view_as(x) for k, x in enumerate(found, 1)]
    total = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
    return [*(x.detach() for x in found), *torch.autograd.grad(total, [x for x in leaves if x.requires_grad])]


EACH = 0.5 + torch.arange(24, dtype=torch.float64) / 7


CAPPED = {"softcap": 2.0, "scale": 0.5, "temperature": EACH, "tile_bytes": 8 * V * 5}
PADDED = {"vocabulary": 9, "temperature": 0.7, "rows": torch.tensor([1, 2, 8]), "shard": None}


CHOSEN = {"squares": True, "chosen": torch.tensor([3, -1, 7]), "tile_bytes": 8 * V * 5}
EACH_CHOSEN = {"chosen": (torch.arange(48) % V).view(4, 6, 2), "softcap": 2.0}


@pytest.mark.parametrize(
    "settings", [CAPPED, PADDED, CHOSEN, EACH_CHOSEN], ids=["capped", "padded", "chosen", "each_chosen"]
)
def test_one_operation_of_the_graph(settings):
    hidden, weight, bias, tokens = layer()
    tokens = tokens.clamp(max=settings.get("vocabulary", V) - 1)

    def f(hidden, weight, bias):
        return tc.head.log_probs_and_entropies(hidden.tanh() * 2, weight, tokens, bias, **settings)

    for a, b in zip(gradients(compiled(f), hidden, weight, bias), gradients(f, hidden, weight, bias), strict=True):
        assert torch.equal(a, b) and (a != 0).any()


def test_lengths_that_vary_and_a_frozen_weight():
    hidden, weight, _, tokens = layer()
    frozen = weight.detach()

    def f(hidden, tokens):
        return tc.head.log_probs_and_entropies(hidden, frozen, tokens)

    torch._dynamo.reset()
    g = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (6, 3, 5):
        x, y = hidden.detach()[:, :length].requires_grad_(), tokens[:, :length]
        found, expected = gradients(lambda h, y=y: g(h, y), x), gradients(lambda h, y=y: f(h, y), x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast():
    hidden, weight, bias, tokens = layer(torch.float32)

    def f(hidden, weight, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tc.head.log_probs_and_entropies(hidden, weight, tokens, bias, logits_dtype=torch.float32)

    for a, b in zip(gradients(compiled(f), hidden, weight, bias), gradients(f, hidden, weight, bias), strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chosen": torch.tensor(3)}, r"chosen: expected int32 or int64 \[1\], got int64 \[\]"),
        ({"chosen": torch.zeros(2, 5, dtype=torch.long)}, r"chosen: expected int32 or int64 \[4, 6, 5\], got"),
        ({"weight": torch.zeros(D, dtype=torch.float64)}, r"weight: expected float \[V, d\], got"),
        ({"hidden": torch.zeros((), dtype=torch.float64)}, r"hidden: expected \[4, 6, 5\], got float64 \[\]"),
        ({"tokens": torch.tensor(1)}, "hidden: expected "),
        ({"bias": torch.tensor(1.0, dtype=torch.float64)}, "bias: expected "),
        ({"temperature": torch.tensor(1.0, dtype=torch.float64)}, "temperature: expected "),
    ],
    ids=str,
)
def test_wrong_shapes_have_the_errors_of_the_function(wrong, message):
    hidden, weight, bias, tokens = layer()
    given = {"hidden": hidden, "weight": weight, "bias": bias, "tokens": tokens} | wrong

    def f(given):
        return sum(x.sum() for x in tc.head.log_probs_and_entropies(**given))

    for call in (f, compiled(f)):
        with pytest.raises(ValueError, match=message):
            call(given)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, where a graph continues
def test_a_compiled_model_with_the_layer_and_a_loss_inside():
    objective = tc.mix("gspo", terms=("entropy(0.1)",))
    batch = naive.with_inputs(naive.random_batch(3)[0], objective.required_inputs)
    prepared = objective.prepare(batch)
    body = torch.nn.Sequential(torch.nn.Linear(D, 8), torch.nn.Tanh(), torch.nn.Linear(8, D)).double()
    layer = torch.nn.Linear(D, V).double()
    inputs = torch.randn((*batch.shape, D), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = batch.tokens.masked_fill(~batch.response_mask, -1).view(batch.shape)

    def from_log_probs(x):
        log_probs, entropies = tc.head.log_probs_and_entropies(body(x), layer.weight, tokens, layer.bias)
        return (log_probs * 2).exp().sum() + entropies.sum()

    def from_hidden(x):
        out = objective.loss_from_hidden(prepared, body(x), layer.weight, layer.bias)
        return out.loss * 2 + out.metrics["policy_loss"].sin()

    for f, whole in ((from_log_probs, True), (from_hidden, False)):
        torch._dynamo.reset()
        g = torch.compile(f, backend="aot_eager", fullgraph=whole)
        parameters = [*body.parameters(), *layer.parameters()]
        for a, b in zip(*(torch.autograd.grad(h(inputs), parameters) for h in (g, f)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
            assert (a != 0).any()


def test_main_grad_is_the_hooks_affair_in_a_graph():
    """An operation of a graph changes no tensor that the graph does not know."""
    hidden, weight, _, tokens = layer()
    weight.main_grad = torch.zeros(V, D, dtype=torch.float64)
    weight.grad_added_to_main_grad = False

    def f(hidden, weight):
        return tc.head.log_probs_and_entropies(hidden, weight, tokens)[0].sum()

    compiled(f)(hidden, weight).backward()
    found, weight.grad = weight.grad, None
    assert (weight.main_grad == 0).all() and not weight.grad_added_to_main_grad
    f(hidden, weight).backward()
    torch.testing.assert_close(weight.main_grad, found)


def test_nan_and_no_position():
    hidden, weight, bias, tokens = layer()
    with torch.no_grad():
        hidden[tokens < 0] = math.nan

    def f(hidden, weight, bias, tokens):
        return tc.head.log_probs_and_entropies(hidden, weight, tokens, bias)

    g = compiled(f)
    for at in (tokens, torch.full_like(tokens, -1)):
        found = gradients(lambda *x, at=at: g(*x, at), hidden, weight, bias)
        for a, b in zip(found, gradients(lambda *x, at=at: f(*x, at), hidden, weight, bias), strict=True):
            assert torch.equal(a, b) and a.isfinite().all()
    wrong = tokens.clone()
    wrong[1, 1] = V
    with pytest.raises(ValueError, match="tokens: expected -1 or an id below"):
        g(hidden, weight, bias, wrong)


def test_opcheck():
    hidden, weight, bias, tokens = (x.detach() for x in layer())
    chosen = torch.tensor([3, -1])
    arguments = (hidden, weight, bias, tokens, None, chosen, None, 1.0, None, 1.0, None, None, None)
    torch.library.opcheck(torch.ops.tokcredit.head.default, (*arguments, True))
    sums = head_op._forward(*arguments, True)
    given = (sums[0], None, sums[2], sums[3])
    for wanted in ((True, True, True), (True, False, False)):
        torch.library.opcheck(torch.ops.tokcredit.head_gradient.default, (*arguments, *sums, *given, *wanted))
