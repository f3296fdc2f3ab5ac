import math

import pytest
import ragged
import torch
from tokcredit import Spans
from tokcredit.blocks import length

GAMMA = 0.997
SPANS = ragged.packed(4, 0, 3, mask=torch.tensor([1, 0, 1, 1, 1, 1, 1]).bool())


def test_targets_are_discounted_returns():
    g = 0.9
    expected = [0.0] * 7
    for row in ([0, 2, 3], [4, 5, 6]):
        for k, t in enumerate(row):
            expected[t] = sum(-(1 - g) * g**i for i in range(len(row) - k))
    assert length.targets(SPANS, g).tolist() == pytest.approx(expected)
    assert length.remaining(SPANS).tolist() == [3, 0, 2, 1, 3, 2, 1]


@pytest.mark.parametrize("trace", [0.0, 0.6, 0.999999])
def test_targets_mix_returns_of_every_length(trace):
    g = 0.9
    v = -torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = length.targets(SPANS, g, v, trace)
    for row in ([0, 2, 3], [4, 5, 6]):
        values = [*v[row].tolist(), 0.0]
        for t in range(3):
            n_step = [sum(-(1 - g) * g**k for k in range(n)) + g**n * values[t + n] for n in range(1, 4 - t)]
            mixed = sum((1 - trace) * trace**n * x for n, x in enumerate(n_step[:-1])) + trace ** (2 - t) * n_step[-1]
            assert got[row[t]].item() == pytest.approx(mixed, abs=1e-6)
    assert got[1] == 0


def test_by_hand():
    for tokens, value in ((1, -0.003), (100, -0.259516), (1000, -0.950437)):
        assert length.targets(Spans.single(tokens), GAMMA)[0].item() == pytest.approx(value, abs=1e-6)
    assert length.gamma_for(2000) == pytest.approx(0.997700, abs=1e-6)
    assert length.gamma_for(20000) == pytest.approx(0.999770, abs=1e-6)


def test_the_way_back_is_exact_even_for_long_rows():
    tokens = torch.tensor([1.0, 100.0, 5000.0, 20000.0], dtype=torch.float64)
    stay = GAMMA**tokens  # 1 + V
    z = ((1 - stay) / stay).log()
    torch.testing.assert_close(length.tokens(z, GAMMA), tokens, rtol=1e-9, atol=0)
    torch.testing.assert_close(length.tokens(z.float(), GAMMA), tokens.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(length.tokens_of_value(stay[:3] - 1, GAMMA), tokens[:3], rtol=1e-6, atol=0)
    assert length.tokens_of_value(torch.tensor([0.0, -1.0]), GAMMA).tolist() == pytest.approx(
        [0, math.log(1e-6) / math.log(GAMMA)], rel=0.02
    )


@pytest.mark.parametrize("floor", [None, 1 - GAMMA])
def test_squared_loss(floor):
    z = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[1] = math.nan
    z.requires_grad_()
    target = length.targets(SPANS, GAMMA).double()
    loss = length.squared(z, target, SPANS, floor)
    loss.backward()
    inside = [0, 2, 3, 4, 5, 6]
    x = z.detach()[inside].requires_grad_()
    error = -1 / (1 + (-x).exp()) - target[inside]
    if floor is not None:
        error = error / target[inside].abs().clamp(min=floor)
    expected = (error**2).sum() / 6
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z.grad[inside], x.grad)
    assert z.grad[1] == 0


def test_cross_entropy_is_least_at_the_target():
    target = length.targets(SPANS, 0.9).double()
    best = (-target / (1 + target)).log().masked_fill(~SPANS.mask, math.nan).requires_grad_()
    loss = length.cross_entropy(best, target, SPANS)
    loss.backward()
    assert best.grad.abs().max() < 1e-7 and best.grad[1] == 0
    share = -target[SPANS.mask]
    assert loss.item() == pytest.approx(-(share * share.log() + (1 - share) * (1 - share).log()).mean().item())


def test_wrong_settings_are_errors():
    with pytest.raises(ValueError, match="gamma: expected a number between 0 and 1, got 1"):
        length.targets(SPANS, 1.0)
    with pytest.raises(ValueError, match="values: expected float"):
        length.targets(SPANS, 0.9, trace=0.5)
    with pytest.raises(ValueError, match="length, resolved"):
        length.gamma_for(0)
    with pytest.raises(TypeError, match=r"spans: expected tokcredit\.Spans, got Tensor"):
        length.remaining(SPANS.begin)


def test_empty():
    none = torch.zeros(0, dtype=torch.long)
    spans = Spans(none, none, 0)
    assert length.targets(spans, 0.9).shape == (0,)
    assert length.squared(torch.zeros(0), torch.zeros(0), spans) == 0


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("cut", [False, True])
def test_advantages_are_those_of_a_cost_per_token(trace, cut):
    """A backward loop over the unmasked tokens; a cut row continues as predicted before its last token."""
    gamma, values = 0.9, -torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truncated = torch.tensor([False, False, True]) if cut else None
    got = length.advantages(values, SPANS, gamma, trace, truncated)
    for tokens, is_cut in (([0, 2, 3], False), ([4, 5, 6], cut)):
        v = values[tokens].tolist()
        after = min((1 + v[-1]) / gamma - 1, 0.0) if is_cut else 0.0
        advantage = 0.0
        for k in reversed(range(3)):
            following = v[k + 1] if k < 2 else after
            advantage = gamma - 1 + gamma * following - v[k] + gamma * trace * advantage
            assert got[tokens[k]].item() == pytest.approx(advantage)
    assert got[1] == 0
    if cut:
        assert got[6].item() == pytest.approx(0.0, abs=1e-12)
