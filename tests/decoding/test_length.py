import math

import pytest
import tokcredit as tc
import torch
from tokcredit.decoding import length
from tokcredit.ops import Rows

GAMMA = 0.997
ROWS = Rows(torch.tensor([0, 4, 4]), torch.tensor([4, 4, 7]), torch.tensor([1, 0, 1, 1, 1, 1, 1]).bool())


def test_targets_are_discounted_returns():
    g = 0.9
    expected = [0.0] * 7
    for row in ([0, 2, 3], [4, 5, 6]):
        for k, t in enumerate(row):
            expected[t] = sum(-(1 - g) * g**i for i in range(len(row) - k))
    assert length.targets(ROWS, 7, g).tolist() == pytest.approx(expected)
    assert length.remaining(ROWS, 7).tolist() == [3, 0, 2, 1, 3, 2, 1]


@pytest.mark.parametrize("trace", [0.0, 0.6, 0.999999])
def test_targets_mix_returns_of_every_length(trace):
    g = 0.9
    v = -torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = length.targets(ROWS, 7, g, v, trace)
    for row in ([0, 2, 3], [4, 5, 6]):
        values = [*v[row].tolist(), 0.0]
        for t in range(3):
            n_step = [sum(-(1 - g) * g**k for k in range(n)) + g**n * values[t + n] for n in range(1, 4 - t)]
            mixed = sum((1 - trace) * trace**n * x for n, x in enumerate(n_step[:-1])) + trace ** (2 - t) * n_step[-1]
            assert got[row[t]].item() == pytest.approx(mixed, abs=1e-6)
    assert got[1] == 0


def test_by_hand():
    for tokens, value in ((1, -0.003), (100, -0.259516), (1000, -0.950437)):
        rows = Rows(torch.tensor([0]), torch.tensor([tokens]))
        assert length.targets(rows, tokens, GAMMA)[0].item() == pytest.approx(value, abs=1e-6)
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
    target = length.targets(ROWS, 7, GAMMA).double()
    loss = length.squared(z, target, ROWS, floor)
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
    target = length.targets(ROWS, 7, 0.9).double()
    best = (-target / (1 + target)).log().masked_fill(~ROWS.mask, math.nan).requires_grad_()
    loss = length.cross_entropy(best, target, ROWS)
    loss.backward()
    assert best.grad.abs().max() < 1e-7 and best.grad[1] == 0
    share = -target[ROWS.mask]
    assert loss.item() == pytest.approx(-(share * share.log() + (1 - share) * (1 - share).log()).mean().item())


def test_tilt_shortens_with_a_negative_beta():
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    z = torch.tensor([-math.inf, 0.0, 2.0], dtype=torch.float64)
    v = [0.0, 0.5, 1 / (1 + math.exp(-2))]
    for beta in (-20.0, 0.0, 3.0):
        weights = [a * math.exp(beta * b) for a, b in zip(p.tolist(), v, strict=True)]
        expected = [w / sum(weights) for w in weights]
        assert length.tilt(p.log(), z, beta).exp().tolist() == pytest.approx(expected)
    assert length.tilt(p.log(), z, -20.0).argmax() == 0


def test_tilt_to_a_mean():
    p = torch.tensor([[0.2, 0.5, 0.3]] * 4).log()
    z = torch.tensor([[-2.0, 0.0, 2.0]] * 4)
    v = z[0].sigmoid()
    wanted = torch.tensor([0.3, 0.7, 0.01, 0.99])
    tilted = length.tilt_to(p, z, wanted).exp()
    torch.testing.assert_close((tilted * v).sum(1)[:2], wanted[:2], rtol=1e-5, atol=1e-6)
    beta = (tilted[0] / p[0].exp()).log().diff() / v.diff()
    torch.testing.assert_close(beta[0], beta[1], rtol=1e-3, atol=1e-4)
    assert tilted[2].tolist() == [1, 0, 0] and tilted[3].tolist() == [0, 0, 1]


def test_nearest():
    tokens = torch.tensor([[10.0, 30.0, 50.0]], dtype=torch.float64)
    z = (GAMMA**-tokens - 1).log()
    p = torch.tensor([[0.2, 0.3, 0.5]]).log()
    cases = ((28.0, 1), (0.0, 0), (math.inf, 2), (47.0, 2))
    assert [length.nearest(p, z, torch.tensor([w]), GAMMA).item() for w, _ in cases] == [i for _, i in cases]
    same = torch.tensor([[1.0, 1.0, 5.0]])
    assert length.nearest(p, same, torch.tensor([0.0]), GAMMA).item() == 1


def test_processor_tilts_the_likeliest_and_excludes_the_rest():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    seen = []

    def head(input_ids, candidates):
        seen.append(candidates.tolist())
        return torch.where(candidates == 1, -math.inf, 1.0)

    out = length.LengthTilt(head, beta=-3.0, candidates=3)(torch.zeros(1, 1), scores)
    assert seen == [[[0, 1, 2]]]
    expected = length.tilt(scores[:, :3].log_softmax(-1), torch.tensor([[1.0, -math.inf, 1.0]]), -3.0)
    torch.testing.assert_close(out[:, :3], expected)
    assert out[0, 3] == -math.inf and out.argmax() == 1
    narrow = length.LengthTilt(head, beta=0.0, candidates=3, top_p=0.5)(torch.zeros(1, 1), scores)
    assert narrow.isfinite().tolist() == [[True, False, False, False]]


def test_processor_leaves_the_token_of_the_wanted_length():
    """Tokens 0 to 3 promise 40, 0 (the end), 10 and 25 more; the last is too unlikely to be asked about."""
    promised = torch.tensor([40.0, 0.0, 10.0, 25.0], dtype=torch.float64)
    z = torch.where(promised > 0, (GAMMA**-promised - 1).log(), -math.inf)
    scores = torch.tensor([[2.0, 1.9, 1.8, -20.0]])

    def chosen(rule, generated, candidates=4):
        guide = length.LengthLimit(
            lambda _, tokens: z[tokens], GAMMA, prompt=3, total=30, rule=rule, candidates=candidates
        )
        out = guide(torch.zeros(1, 3 + generated), scores)
        assert out.isfinite().sum() == 1
        return out.argmax().item()

    assert [chosen(length.exactly, n) for n in (0, 12, 28, 40)] == [0, 2, 1, 1]
    assert [chosen(length.at_most, n) for n in (0, 40)] == [1, 1]
    assert [chosen(length.at_least, n) for n in (0, 29, 30)] == [0, 0, 1]
    assert chosen(length.at_most, 0, candidates=1) == 0


def test_wrong_settings_are_errors():
    with pytest.raises(ValueError, match="gamma: expected a number between 0 and 1, got 1"):
        length.targets(ROWS, 7, 1.0)
    with pytest.raises(ValueError, match="values: expected float"):
        length.targets(ROWS, 7, 0.9, trace=0.5)
    with pytest.raises(ValueError, match="length, resolved"):
        length.gamma_for(0)
    with pytest.raises(ValueError, match="candidates, top_p"):
        length.LengthTilt(lambda a, b: b, 1.0, candidates=0)


def test_empty():
    none = torch.zeros(0, dtype=torch.long)
    rows = Rows(none, none)
    assert length.targets(rows, 0, 0.9).shape == (0,)
    assert length.squared(torch.zeros(0), torch.zeros(0), rows) == 0
    assert tc.decoding.length is length
