import math

import pytest
import torch
from tokcredit.decoding import length

GAMMA = 0.997


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
    with pytest.raises(ValueError, match="candidates, top_p"):
        length.LengthTilt(lambda a, b: b, 1.0, candidates=0)
    with pytest.raises(ValueError, match="gamma: expected a number between 0 and 1, got 1"):
        length.LengthLimit(lambda a, b: b, 1.0, prompt=3, total=30)
