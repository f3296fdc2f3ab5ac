"""Losses of a divergence from hidden states equal those from logits of both models: values, gradients and metrics."""

import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit import supervised
from tokcredit.blocks import tiles
from tokcredit.methods.sstoken import improved_share

D, E, V = 4, 6, 9
METHODS = ["gkd", "sdpo", "sdft", "opsd", "tip"]


def model(batch, width, seed):
    g = torch.Generator().manual_seed(seed)
    shapes = ((*batch.shape, width), (V, width), (V,))
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def case(objective, seed=3):
    batch, _ = naive.random_batch(seed)
    batch = naive.with_inputs(batch, objective.required_inputs)
    student, teacher = model(batch, D, 1), model(batch, E, 2)
    return objective.prepare(batch), [x.requires_grad_() for x in student], teacher


def from_logits(objective, prepared, student, teacher, temperature=1.0):
    logits, others = (h @ w.t() + b for h, w, b in (student, teacher))
    batch = prepared.batch
    tokens = batch.shaped(batch.tokens.masked_fill(~batch.response_mask, -1))
    log_probs = tc.log_probs.with_entropies(logits, tokens, temperature)[0].detach()
    further = dict.fromkeys(objective.variables[1:], log_probs)
    return objective.loss(prepared, objective.token_loss(logits, others, temperature), **further)


@pytest.mark.parametrize("tile_bytes", [None, 8 * V * 2 * 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, temperature, tile_bytes):
    objective = tc.methods.load(name)
    prepared, student, teacher = case(objective)
    head = tc.head.Head(*teacher[1:])
    settings = {"temperature": temperature, "tile_bytes": tile_bytes}
    found = objective.loss_from_hidden(prepared, *student, teacher=(teacher[0], head), **settings)
    expected = from_logits(objective, prepared, student, teacher, temperature)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-12)
    for key, x in expected.metrics.items():
        torch.testing.assert_close(found.metrics[key], x, rtol=1e-9, atol=1e-12, msg=key)
    ours, theirs = (torch.autograd.grad(3 * x.loss, student) for x in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert a.abs().sum() > 0.01


def test_top_tokens_a_softcap_and_a_cap():
    token_loss = supervised.reverse_kl(top_k=3, cap=0.3)
    objective = tc.methods.gkd(token_loss)
    prepared, student, teacher = case(objective)
    head = tc.head.Head(*teacher[1:], softcap=2.0, scale=0.5)
    found = objective.loss_from_hidden(prepared, *student, teacher=(teacher[0], head), softcap=3.0, scale=1.5)
    logits = 3.0 * torch.tanh(1.5 * (student[0] @ student[1].t() + student[2]) / 3.0)
    others = 2.0 * torch.tanh(0.5 * (teacher[0] @ teacher[1].t() + teacher[2]) / 2.0)
    expected = objective.loss(prepared, token_loss(logits, others))
    torch.testing.assert_close(found.loss, expected.loss)
    for a, b in zip(*(torch.autograd.grad(x.loss, student) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("kind", ["js", "reverse_kl", "forward_kl"])
def test_an_id_that_both_models_forbid_has_no_gradient(kind, top_k, softcap):
    objective = tc.methods.gkd(getattr(supervised, kind)(top_k=top_k))
    prepared, student, teacher = case(objective)
    for _, _, bias in (student, teacher):
        bias.detach()[V - 1] = -math.inf
    head = tc.head.Head(*teacher[1:], softcap=softcap)
    loss = objective.loss_from_hidden(prepared, *student, teacher=(teacher[0], head), softcap=softcap).loss
    gradients = torch.autograd.grad(loss, student)
    assert loss.isfinite() and all(x.isfinite().all() for x in gradients)
    assert not gradients[1][V - 1].any() and gradients[2][V - 1] == 0 and gradients[1].abs().sum() > 0.01


def test_without_gradient_only_the_value_is_computed(monkeypatch):
    monkeypatch.setattr(tiles.Sums, "add", lambda *_: pytest.fail("a gradient was computed"))
    objective = tc.methods.gkd()
    prepared, student, teacher = case(objective)
    expected = from_logits(objective, prepared, student, teacher).loss.detach()
    with torch.no_grad():
        arguments = {"teacher": (teacher[0], tc.head.Head(*teacher[1:])), "tile_bytes": 8 * V * 4}
        found = objective.loss_from_hidden(prepared, *student, **arguments)
    torch.testing.assert_close(found.loss, expected)
    assert not found.loss.requires_grad


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_nan_under_the_mask_changes_nothing_and_at_a_trained_token_it_reaches_the_loss(of):
    objective = tc.methods.gkd()
    prepared, student, teacher = case(objective)
    head, chosen = tc.head.Head(*teacher[1:]), prepared.batch.shaped(prepared.batch.response_mask)
    clean = objective.loss_from_hidden(prepared, *student, teacher=(teacher[0], head))
    expected = torch.autograd.grad(clean.loss, student)
    dirty = (student[0].detach() if of == "student" else teacher[0]).clone()
    dirty[~chosen] = math.nan

    def loss():
        hidden = dirty.clone().requires_grad_() if of == "student" else student[0]
        leaves = [hidden, *student[1:]]
        seen = dirty if of == "teacher" else teacher[0]
        return leaves, objective.loss_from_hidden(prepared, *leaves, teacher=(seen, head)).loss

    leaves, found = loss()
    for a, b in zip(torch.autograd.grad(found, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)
    row, column = chosen.nonzero()[0].tolist()
    dirty[row, column] = math.nan
    leaves, found = loss()
    of_hidden = torch.autograd.grad(found, leaves)[0]
    assert found.isnan() and of_hidden.isnan().any(-1).nonzero().tolist() == [[row, column]]


def test_wrong_arguments():
    objective = tc.methods.gkd()
    prepared, student, teacher = case(objective)
    head = tc.head.Head(*teacher[1:])
    with pytest.raises(
        TypeError, match=r"teacher: expected hidden states and an output layer because of js\(.*got None"
    ):
        objective.loss_from_hidden(prepared, *student)
    with pytest.raises(TypeError, match=r"teacher: expected None because of nll\(\), got hidden states"):
        sft = tc.methods.sft()
        sft.loss_from_hidden(sft.prepare(prepared.batch), *student, teacher=(teacher[0], head))
    with pytest.raises(ValueError, match="teacher: expected the student's vocabulary of 9, got 8"):
        smaller = tc.head.Head(*teacher[1:], vocabulary=8)
        objective.loss_from_hidden(prepared, *student, teacher=(teacher[0], smaller))
    with pytest.raises(ValueError, match="teacher: expected a temperature of 1"):
        warm = tc.head.Head(*teacher[1:], temperature=0.5)
        objective.loss_from_hidden(prepared, *student, teacher=(teacher[0], warm))
    with pytest.raises(ValueError, match=r"teacher: expected hidden states \[12, 7, 6\], got"):
        objective.loss_from_hidden(prepared, *student, teacher=(teacher[0][:3], head))
    share = improved_share(0.6, 0.5, "ref_log_probs", "prompt_attention")
    chosen = tc.mix("gkd", selection=share)
    inputs = naive.with_inputs(prepared.batch, chosen.required_inputs)
    with pytest.raises(ValueError, match=r"selection: expected None because of js\(.*got improved_share"):
        chosen.loss_from_hidden(chosen.prepare(inputs), *student, teacher=(teacher[0], head))
    coupled = tc.mix("gkd", scales="within('k1', 'mean')")
    with pytest.raises(ValueError, match=r"scales: expected scales of single tokens, got \(within"):
        coupled.loss_from_hidden(coupled.prepare(prepared.batch), *student, teacher=(teacher[0], head))
    half = [x.detach().half() for x in student]
    with pytest.raises(TypeError, match="hidden: expected bfloat16, float32 or float64, got float16"):
        objective.loss_from_hidden(prepared, *half, teacher=(teacher[0], head))


@pytest.mark.parametrize(
    ("ours", "theirs"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_other_dtypes(ours, theirs):
    objective = tc.methods.gkd()
    prepared, student, teacher = case(objective)
    student = [x.detach().to(getattr(torch, ours)).requires_grad_() for x in student]
    teacher = [x.to(getattr(torch, theirs)) for x in teacher]
    head = tc.head.Head(*teacher[1:])
    found = objective.loss_from_hidden(prepared, *student, teacher=(teacher[0], head), logits_dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in student]
    expected = from_logits(objective, prepared, exact, [x.double() for x in teacher])
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-3, atol=1e-3)
    for a, b in zip(torch.autograd.grad(found.loss, student), torch.autograd.grad(expected.loss, exact), strict=True):
        assert a.dtype == getattr(torch, ours) and (a.double() - b).norm() < 2e-2 * b.norm()


def test_one_backward_pass():
    objective = tc.methods.gkd()
    prepared, student, teacher = case(objective)
    loss = objective.loss_from_hidden(prepared, *student, teacher=(teacher[0], tc.head.Head(*teacher[1:]))).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="loss_from_hidden: expected one backward pass"):
        loss.backward()
