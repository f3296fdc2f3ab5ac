"""Losses from hidden states equal those from logits: values, gradients and metrics, for every method."""

import math
from dataclasses import dataclass, replace

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.stages.scale import Scale

D, V = 4, 3  # tokens of `naive.random_batch` are below 3
METHODS = [name for name in tc.methods.names() if set(tc.methods.load(name).variables) <= {"log_probs", "entropies"}]
COUPLED = set(tc.methods.names()) - set(naive.OF_GROUPS)  # pairs
COUPLED |= {"ctpo", "deepseek_v32", "fipo", "gmpo", "gspo", "gspo_n", "gspo_token"}
COUPLED |= {"luspo", "real", "sstoken", "topr", "vespo"}


def prepared_of(objective, on_policy=False, padded=True):
    pairs = isinstance(objective, tc.Preference)
    batch, _ = (naive.random_pairs if pairs else naive.random_batch)(3)
    if on_policy:
        batch = batch.with_inputs(old_log_probs=None)
    names = set(objective.required_inputs) - ({"old_log_probs"} if on_policy else set())
    batch = naive.with_inputs(batch, names)
    if not padded:
        batch = batch.select(range(batch.num_rows))
    return objective.prepare(batch, progress=0.5)


def model(batch):
    g = torch.Generator().manual_seed(1)
    shape = (*(batch.shape or (batch.num_tokens,)), D)
    hidden, weight, bias = (
        torch.randn(size, generator=g, dtype=torch.float64, requires_grad=True) for size in (shape, (V, D), (V,))
    )
    return hidden, weight, bias


def from_logits(objective, prepared, hidden, weight, bias, temperature=1.0):
    """The same loss from all logits at once."""
    batch = prepared.batch
    tokens = batch.shaped(batch.tokens.masked_fill(~batch.response_mask, -1))
    log_probs, entropies = tc.log_probs.with_entropies(hidden @ weight.t() + bias, tokens, temperature)
    further = {"entropies": entropies} if "entropies" in objective.variables else {}
    return objective.loss(prepared, log_probs, **further)


def compare(objective, prepared, **settings):
    leaves = model(prepared.batch)
    temperature = settings.get("temperature", 1.0)
    found = objective.loss_from_hidden(prepared, leaves[0], leaves[1], leaves[2], **settings)
    expected = from_logits(objective, prepared, *leaves, temperature=temperature)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-12)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, x in expected.metrics.items():
        torch.testing.assert_close(found.metrics[name], x, rtol=1e-9, atol=1e-12, msg=name)
    gradients = torch.autograd.grad(2 * found.loss, leaves)
    for a, b in zip(gradients, torch.autograd.grad(2 * expected.loss, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    return gradients


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tile_bytes", [None, 8 * V * 5])
def test_every_method(name, tile_bytes):
    objective = tc.methods.load(name)
    prepared = prepared_of(objective)
    assert objective.separable(prepared) == (name not in COUPLED)
    gradients = compare(objective, prepared, tile_bytes=tile_bytes)
    assert name == "gspo_n" or all((g != 0).any() for g in gradients), "gspo_n clips every row of this batch"


@pytest.mark.parametrize("name", ["ctpo", "gspo", "grpo", "cispo"])
def test_on_policy_every_ratio_is_1(name):
    """Ratios of several tokens are 1 as well, so one pass suffices. Bounds that grow along a row stay as they are."""
    objective = tc.methods.load(name)
    prepared = prepared_of(objective, on_policy=True)
    assert objective.separable(prepared)
    compare(objective, prepared, tile_bytes=8 * V * 4)


@pytest.mark.parametrize("padded", [False, True])
def test_terms_filters_and_temperature(padded):
    objective = tc.mix(
        "dapo",
        terms=("kl(0.1, estimator='k3')", "entropy(0.01)"),
        filters="top_share(0.5, given('entropies'))",
        clip="growing(0.01, 0.02)",
    )
    prepared = prepared_of(objective, padded=padded)
    assert objective.separable(prepared)
    for tile_bytes in (None, 8 * V * 3):
        compare(objective, prepared, tile_bytes=tile_bytes, temperature=0.7)


def test_micro_batches_add_up():
    objective = tc.methods.tempo()
    prepared = prepared_of(objective)
    hidden, weight, bias = model(prepared.batch)
    whole = torch.autograd.grad(objective.loss_from_hidden(prepared, hidden, weight, bias).loss, (hidden, weight, bias))
    hidden_parts = [torch.zeros_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)]
    for rows in (range(0, 5), range(5, 12)):
        part = objective.loss_from_hidden(prepared.select(rows), hidden[list(rows)], weight, bias)
        for total, x in zip(hidden_parts, torch.autograd.grad(part.loss, (hidden, weight, bias)), strict=True):
            total += x
    for a, b in zip(hidden_parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "gspo", "sft"])
def test_nan_under_a_mask_stays_there_and_at_a_token_that_trains_does_not(name):
    objective = tc.methods.load(name)
    prepared = prepared_of(objective)
    leaves = model(prepared.batch)
    clean = torch.autograd.grad(objective.loss_from_hidden(prepared, *leaves).loss, leaves)
    mask = prepared.batch.shaped(prepared.batch.response_mask)
    with torch.no_grad():
        leaves[0][~mask] = math.nan
    found = torch.autograd.grad(objective.loss_from_hidden(prepared, *leaves).loss, leaves)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)
    row, column = (mask & prepared.batch.shaped(prepared.mask)).nonzero()[2].tolist()
    with torch.no_grad():
        leaves[0][row, column] = math.nan
    loss = objective.loss_from_hidden(prepared, *leaves).loss
    of_hidden, of_weight, _ = torch.autograd.grad(loss, leaves)
    assert loss.isnan() and of_hidden[row, column].isnan().all() and of_weight.isnan().any()


def test_a_scale_that_says_nothing_is_taken_to_couple_tokens():
    @dataclass(frozen=True)
    class largest(Scale):
        def __call__(self, log_probs, log_ratio, advantages, spans, window, signal):
            return (log_probs > log_probs.median()).to(log_probs.dtype)

    objective = tc.Objective(scales=(largest(),))
    prepared = prepared_of(objective)
    assert not objective.separable(prepared)
    compare(objective, prepared)


def test_one_pass_has_one_backward_pass():
    objective = tc.methods.grpo()
    prepared = prepared_of(objective)
    hidden, weight, bias = model(prepared.batch)
    loss = objective.loss_from_hidden(prepared, hidden, weight, bias).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_golden_numbers():
    """GRPO over two tokens, the first of which is clipped: its hidden state does not reach the weight."""
    hidden = torch.tensor([[1.0, -1], [0.5, 2], [-1, 0.5]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.5, -0.5], [1, 0.25], [-0.75, 1], [0.25, 0.1]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.1, -0.2, 0, 0.3], dtype=torch.float64)
    batch = tc.Rollouts(
        torch.tensor([0, 2, 1]),
        torch.tensor([0, 1, 2, 3]),
        torch.zeros(3, dtype=torch.long),
        torch.zeros(3, dtype=torch.float64),
        response_mask=torch.tensor([True, True, False]),
        old_log_probs=torch.tensor([-0.9, -0.3, math.nan], dtype=torch.float64),
    )
    prepared = tc.methods.grpo().prepare(batch)
    prepared = replace(prepared, credit=torch.tensor([[1.5], [-0.5], [0.0]], dtype=torch.float64))
    settings = {"temperature": 0.8, "softcap": 3.0, "scale": 1.5}
    out = tc.methods.grpo().loss_from_hidden(prepared, hidden, weight, bias, **settings)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.6906532511, abs=1e-9)
    assert out.log_probs.tolist() == pytest.approx([-0.57684976, -0.477468955, 0], abs=1e-8)
    assert hidden.grad.flatten().tolist() == pytest.approx([0, 0, -0.148036943, 0.061613956, 0, 0], abs=1e-8)
    expected = [
        [-0.002730441, -0.010921764],
        [-0.03497941, -0.139917639],
        [0.040966267, 0.163865066],
        [-0.027796565, -0.11118626],
    ]
    torch.testing.assert_close(weight.grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_autocast_and_a_scaled_loss():
    objective = tc.methods.dapo()
    prepared = prepared_of(objective)
    leaves = [x.detach().float().requires_grad_() for x in model(prepared.batch)]
    exact = [x.detach().bfloat16().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(from_logits(objective, prepared, *exact).loss / 3, exact)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            out = objective.loss_from_hidden(prepared, *leaves, logits_dtype=torch.float32)
        for a, b in zip(torch.autograd.grad(out.loss / 3, leaves), expected, strict=True):
            assert a.dtype == torch.float32 and (a.double() - b).norm() <= 2e-2 * b.norm()


def test_without_grad_nothing_is_differentiated():
    objective = tc.methods.grpo()
    prepared = prepared_of(objective)
    leaves = model(prepared.batch)
    expected = from_logits(objective, prepared, *leaves)
    with torch.no_grad():
        out = objective.loss_from_hidden(prepared, *leaves)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    assert not out.loss.requires_grad


def test_gaps_between_rows_are_not_read():
    objective = tc.methods.grpo()
    spans = tc.Spans(torch.tensor([1, 4]), torch.tensor([3, 6]), 7)
    tokens = torch.tensor([99, 0, 1, 99, 2, 1, 99])  # 99 is no id of the model
    batch = tc.Rollouts(tokens, spans, torch.zeros(2, dtype=torch.long), torch.tensor([1.0, 0.0], dtype=torch.float64))
    prepared = objective.prepare(batch)
    hidden, weight, bias = model(batch)
    with torch.no_grad():
        hidden[[0, 3, 6]] = math.nan
    out = objective.loss_from_hidden(prepared, hidden, weight, bias, tile_bytes=8 * V)
    out.loss.backward()
    assert out.log_probs[[0, 3, 6]].tolist() == [0.0] * 3 and weight.grad.isfinite().all()
    assert (hidden.grad[[1, 2, 4, 5]] != 0).any(1).all() and (hidden.grad[[0, 3, 6]] == 0).all()


def test_no_token_trains():
    objective = tc.methods.grpo()
    batch, _ = naive.random_batch()
    prepared = objective.prepare(batch.with_mask(torch.zeros_like(batch.response_mask)))
    leaves = model(batch)
    loss = objective.loss_from_hidden(prepared, *leaves).loss
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() for x in leaves)


def test_other_variables_are_refused():
    objective = tc.methods.load("minillm")
    with pytest.raises(TypeError, match="objective: expected a loss of log-probs and entropies, got one of reverse_kl"):
        objective.loss_from_hidden(prepared_of(objective), *model(naive.random_batch(3)[0]))


def test_shapes_are_checked():
    objective = tc.methods.grpo()
    prepared = prepared_of(objective)
    hidden, weight, bias = model(prepared.batch)
    with pytest.raises(ValueError, match=r"hidden: expected \[12, 7, 4\], got float64 \[84, 4\]"):
        objective.loss_from_hidden(prepared, hidden.reshape(84, 4), weight, bias)


def test_a_token_out_of_range_on_the_cpu():
    hidden, weight = torch.ones(3, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    # -100 is other libraries' mark for no token.
    for tokens, vocabulary in (([0, 4, 1], None), ([0, 3, 1], 3), ([0, -100, 1], None)):
        with pytest.raises(ValueError, match="tokens"):
            tc.head.log_probs_and_entropies(hidden, weight, torch.tensor(tokens), vocabulary=vocabulary)
    with pytest.raises(ValueError, match=r"temperature: expected positive numbers, got \[0.0\]"):
        tc.head.log_probs_and_entropies(
            hidden, weight, torch.tensor([0, 1, 1]), temperature=torch.tensor([1.0, 0.0, 2.0])
        )


@pytest.mark.parametrize("name", ["grpo", "ctpo"])
@pytest.mark.parametrize("padded", [True, False])
def test_further_variables_from_the_same_hidden_states(name, padded):
    """The values of a critic, with terms that read entropies beside them."""
    objective = tc.mix(name, terms=("value(0.5)", "entropy(0.1)"))
    prepared = prepared_of(objective, padded=padded)
    assert objective.separable(prepared) == (name == "grpo")
    hidden, weight, bias = model(prepared.batch)
    head = torch.randn(D, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    leaves = (hidden, weight, bias, head)
    batch = prepared.batch
    tokens = batch.shaped(batch.tokens.masked_fill(~batch.response_mask, -1))
    log_probs, entropies = tc.log_probs.with_entropies(hidden @ weight.t() + bias, tokens)
    expected = objective.loss(prepared, log_probs, entropies=entropies, values=hidden @ head)
    found = objective.loss_from_hidden(
        prepared, hidden, weight, bias, variables={"values": hidden @ head}, tile_bytes=8 * V * 5
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-12)
    assert expected.metrics["value_loss"] > 0
    torch.testing.assert_close(found.metrics["value_loss"], expected.metrics["value_loss"])
    gradients = torch.autograd.grad(2 * found.loss, leaves)
    for a, b in zip(gradients, torch.autograd.grad(2 * expected.loss, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert (a != 0).any()


def test_further_variables_are_checked():
    objective = tc.mix("grpo", terms="value")
    prepared = prepared_of(objective)
    hidden, weight, bias = model(prepared.batch)
    values = hidden.sum(-1)
    with pytest.raises(TypeError, match="objective: expected a loss of log-probs and entropies, got one of values"):
        objective.loss_from_hidden(prepared, hidden, weight, bias)
    with pytest.raises(ValueError, match=r"values: expected \[12, 7\], got \[84\]"):
        objective.loss_from_hidden(prepared, hidden, weight, bias, variables={"values": values.reshape(-1)})
    with pytest.raises(TypeError, match="variables: expected none that follows from hidden, got entropies"):
        given = {"values": values, "entropies": values}
        objective.loss_from_hidden(prepared, hidden, weight, bias, variables=given)
    with pytest.raises(TypeError, match="values: expected no further variable, got values"):
        plain = tc.methods.grpo()
        plain.loss_from_hidden(plain.prepare(prepared.batch), hidden, weight, bias, variables={"values": values})
