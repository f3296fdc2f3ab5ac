import math

import pytest
import tokcredit as tc
import torch
from tokcredit.decoding.temperature import AdaptiveTemperature
from tokcredit.methods.hapo import entropy_deviation

STATISTICS = (math.log(0.5), 1.5, -2.0, 0.8)


@pytest.mark.parametrize("literal_sign", [False, True])
def test_divides_by_the_temperature_of_each_row(literal_sign):
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 30, 50)[:, None]
    logits[:, 3] = -math.inf
    out = AdaptiveTemperature(0.9, 0.1, STATISTICS, literal_sign)(torch.zeros(50, 1), logits)
    pivot, spread, low, high = STATISTICS
    seen = set()
    for row, got in zip(logits.double(), out.double(), strict=True):
        p = (row / 0.9).softmax(0)
        entropy = -sum(x * math.log(x) for x in p.tolist() if x > 0)
        h = (math.log(max(entropy, 1e-6)) - pivot) / (spread + 1e-6)
        h = h / high if h > 0 else h / (low if literal_sign else -low)
        h = max(-1.0, min(1.0, h))
        seen.add(h > 0)
        torch.testing.assert_close(got, row / (0.9 * (1 + 0.1 * h)), rtol=1e-4, atol=1e-5)
    assert literal_sign or seen == {True, False}


def test_is_the_score_of_the_training_batch():
    """A row of logits whose entropy the batch has seen gets the temperature of that score."""
    logits = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    _, entropies = tc.log_probs.with_entropies(logits, torch.zeros(20, dtype=torch.long))
    batch = tc.Rollouts(
        torch.zeros(20, dtype=torch.long),
        torch.tensor([0, 20]),
        torch.tensor([0]),
        torch.tensor([1.0]),
        entropies=entropies,
    )
    score = entropy_deviation()
    out = AdaptiveTemperature(strength=0.2, statistics=score.statistics(batch))(torch.zeros(20, 1), logits)
    torch.testing.assert_close(out, logits / (1 + 0.2 * score(batch))[:, None], rtol=1e-5, atol=1e-8)


def test_without_statistics_the_base_temperature():
    logits = torch.randn(3, 5)
    assert torch.equal(AdaptiveTemperature(0.7)(torch.zeros(3, 1), logits), logits / 0.7)


def test_wrong_settings_are_errors():
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        AdaptiveTemperature(0)
    with pytest.raises(ValueError, match="strength: expected at least 0 and less than 1, got 1"):
        AdaptiveTemperature(strength=1)


def test_is_accepted_by_transformers():
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(2, 5)
    processors = transformers.LogitsProcessorList([AdaptiveTemperature(0.5)])
    assert torch.equal(processors(torch.zeros(2, 1, dtype=torch.long), logits), logits / 0.5)
