"""Gradient times input: finite differences, and completeness of a linear model."""

from types import SimpleNamespace

import pytest
import tokcredit as tc
import torch
import toy

IDS = torch.tensor([3, 1, 4, 1, 5])


class LinearModel(torch.nn.Module):
    """Logits that are linear in the embeddings: every position has a matrix of its own."""

    def __init__(self, length):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Embedding(20, 4)
        self.weight = torch.nn.Parameter(torch.randn(length, 4, 7, generator=generator))
        self.bias = torch.nn.Parameter(torch.randn(7, generator=generator))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, inputs_embeds):
        logits = torch.einsum("bnd,ndv->bv", inputs_embeds, self.weight) + self.bias
        return SimpleNamespace(logits=logits)


def test_scores_of_a_linear_model_add_up():
    model = LinearModel(5).double()
    for target in range(7):
        scores = tc.attribution.gradient_times_input(model, IDS, target)
        x = model.embedding(IDS)
        torch.testing.assert_close(scores, torch.einsum("nd,nd->n", x, model.weight[..., target]))
        logit = model(inputs_embeds=x[None]).logits[0, target]
        torch.testing.assert_close(scores.sum(), logit - model.bias[target])


def differences(model, target, log_prob, step):
    """Change of the output when one embedding is scaled."""
    x = model.get_input_embeddings()(IDS).detach()

    @torch.no_grad()
    def value(i, s):
        embedded = x.clone()
        embedded[i] *= 1 + s
        logits = model(inputs_embeds=embedded[None]).logits[0]
        logits = logits[-1] if logits.dim() == 2 else logits
        return (logits.log_softmax(-1) if log_prob else logits)[target].item()

    return torch.tensor([(value(i, step) - value(i, -step)) / (2 * step) for i in range(5)], dtype=torch.float64)


@pytest.mark.parametrize("log_prob", [False, True])
def test_against_finite_differences(log_prob):
    model = toy.classifier("bert")
    scores = tc.attribution.gradient_times_input(model, IDS, 1, log_prob)
    torch.testing.assert_close(scores, differences(model, 1, log_prob, 1e-5), rtol=1e-5, atol=1e-7)


def test_a_causal_model_is_asked_for_the_token_after_the_last():
    model = toy.causal()  # its norms are computed in float32
    scores = tc.attribution.gradient_times_input(model, IDS, 7, log_prob=True)
    torch.testing.assert_close(scores, differences(model, 7, True, 3e-3), rtol=0.02, atol=0.002)


def test_classifiers_modes_and_dtypes():
    model = toy.classifier("bert").train()
    scores = tc.attribution.gradient_times_input(model, IDS, 2)
    assert scores.shape == (5,) and model.training and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(tc.attribution.gradient_times_input(model, IDS, 2), scores)
    assert tc.attribution.gradient_times_input(toy.causal().bfloat16(), IDS.int(), 2).dtype == torch.float32


def test_refusals():
    model = toy.causal()
    for arguments, message in (
        ((IDS.float(), 1), "ids: expected integers"),
        ((IDS[None], 1), "ids: expected"),
        ((IDS[:0], 1), "ids: expected"),
        ((IDS, 20), "target: expected a number below 20, got 20"),
        ((IDS, -1), "target: expected"),
        ((IDS, 1.5), "target: expected"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            tc.attribution.gradient_times_input(model, *arguments)
