"""A weight with ``main_grad`` gets its gradient there, under the protocol of Megatron's hooks."""

import naive
import pytest
import tokcredit as tc
import torch

V, D = 13, 5


def layer(dtype, n=40):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(size, generator=g).to(dtype).requires_grad_() for size in ((n, D), (V, D), (V,))
    )
    tokens = torch.randint(0, V, (n,), generator=g)
    tokens[::4] = -1
    return hidden, weight, bias, tokens


def megatron(weight, main_dtype=torch.float32, tied=False):
    """The attributes that Megatron's data-parallel module gives a parameter, and its hook."""
    weight.main_grad = torch.zeros(weight.shape, dtype=main_dtype)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = tied
    seen = []

    def hook(*_):
        seen.append(weight.grad is not None)
        if weight.grad is not None and (not weight.grad_added_to_main_grad or tied):
            weight.main_grad.add_(weight.grad)
        weight.grad = None

    weight.node = weight.expand_as(weight).grad_fn.next_functions[0][0]  # kept alive, and the hook with it
    weight.node.register_hook(hook)
    return seen


def two_passes(hidden, weight, bias, tokens, **settings):
    log_probs, entropies = tc.head.log_probs_and_entropies(hidden, weight, tokens, bias, **settings)
    at = torch.arange(len(tokens), dtype=log_probs.dtype)
    return 3 * ((log_probs * (at - 3)).sum() + entropies.sum())


def one_pass(hidden, weight, bias, tokens, **settings):
    at = torch.arange(len(tokens), dtype=torch.float64)

    def slopes(rows, log_probs, entropies):
        return (at[rows] - 3).to(log_probs.dtype), torch.ones_like(entropies)

    def total(log_probs, entropies):
        return (log_probs * (at - 3)).sum().to(log_probs.dtype) + entropies.sum()

    return 3 * tc.head.separable_loss(hidden, weight, tokens, slopes, total, bias, **settings)


@pytest.mark.parametrize("tile_bytes", [None, 600])
@pytest.mark.parametrize("loss", [one_pass, two_passes])
@pytest.mark.parametrize(
    ("dtype", "main_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_two_micro_batches_add_up(loss, dtype, main_dtype, tile_bytes):
    hidden, weight, bias, tokens = layer(dtype)
    (expected,) = torch.autograd.grad(loss(hidden, weight, bias, tokens), weight)
    seen = megatron(weight, main_dtype)
    for _ in range(2):
        loss(hidden, weight, bias, tokens, tile_bytes=tile_bytes).backward()
    assert weight.grad is None and seen == [True, True] and weight.grad_added_to_main_grad
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (weight.main_grad.double() - 2 * expected.double()).norm() <= rtol * expected.double().norm()
    assert hidden.grad is not None and bias.grad is not None


@pytest.mark.parametrize("loss", [one_pass, two_passes])
def test_the_sum_is_not_rounded_to_the_weight(loss):
    """Many small gradients on a large sum, which bfloat16 would lose."""
    hidden, weight, bias, tokens = layer(torch.bfloat16)
    megatron(weight)
    weight.main_grad.fill_(4096.0)
    (1e-3 * loss(hidden, weight, bias, tokens, logits_dtype=torch.float32)).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    (expected,) = torch.autograd.grad(1e-3 * loss(*exact, tokens), exact[1])
    assert ((weight.main_grad - 4096).double() - expected).norm() <= 3e-2 * expected.norm()


@pytest.mark.parametrize("loss", [one_pass, two_passes])
def test_tied_weight(loss):
    """The gradient of the embedding comes through autograd, and the hook adds it."""
    _, weight, bias, tokens = layer(torch.float64)
    ids = torch.arange(len(tokens)) % V
    (expected,) = torch.autograd.grad(loss(weight[ids], weight, bias, tokens), weight)
    megatron(weight, torch.float64, tied=True)
    loss(weight[ids], weight, bias, tokens).backward()
    torch.testing.assert_close(weight.main_grad, expected)


@pytest.mark.parametrize("loss", [one_pass, two_passes])
def test_without_the_flag_there_is_no_gradient_beside_it(loss):
    hidden, weight, bias, tokens = layer(torch.float32)
    (expected,) = torch.autograd.grad(loss(hidden, weight, bias, tokens), weight)
    weight.main_grad = torch.zeros(V, D)
    loss(hidden, weight, bias, tokens).backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, expected)
    loss(hidden, weight, bias, torch.full_like(tokens, -1)).backward()
    torch.testing.assert_close(weight.main_grad, expected)
    frozen = weight.detach()
    frozen.main_grad = torch.zeros(V, D)
    loss(hidden, frozen, bias, tokens).backward()
    assert (frozen.main_grad == 0).all()


def test_padding_of_the_weight_and_its_autocast_copy():
    hidden, weight, bias, tokens = layer(torch.float32)
    megatron(weight)
    two_passes(hidden, weight, bias, tokens.clamp(max=8), vocabulary=9).backward()
    assert (weight.main_grad[:9] != 0).any(1).all() and (weight.main_grad[9:] == 0).all()
    # Under autocast the product reads a copy of the weight, whose gradient autograd casts and the hook adds.
    weight.main_grad.zero_()
    weight.grad_added_to_main_grad = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = two_passes(hidden, weight, bias, tokens)
    loss.backward()
    assert not weight.grad_added_to_main_grad and (weight.main_grad != 0).any()


def test_an_objective():
    objective = tc.methods.grpo()
    batch = naive.with_inputs(naive.random_batch(3)[0], objective.required_inputs)
    prepared = objective.prepare(batch)
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn((*batch.shape, D), generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(objective.loss_from_hidden(prepared, hidden, weight).loss / 4, weight)
    megatron(weight, torch.float64)
    for rows in (range(0, 5), range(5, 12)):
        part = objective.loss_from_hidden(prepared.select(rows), hidden[list(rows)], weight)
        (part.loss / 4).backward()
    torch.testing.assert_close(weight.main_grad, expected)
    assert (expected != 0).any()


def test_errors():
    hidden, weight, bias, tokens = layer(torch.bfloat16)
    for wrong, error in ((torch.zeros(V, D + 1), ValueError), (torch.zeros(V, D, dtype=torch.float64), TypeError)):
        weight.main_grad = wrong
        with pytest.raises(error, match=r"main_grad: expected bfloat16 or float32 \[13, 5\]"):
            one_pass(hidden, weight, bias, tokens)
