"""Statistics of the mismatch between trainer and engine, against numbers worked out from their definitions."""

import math

import naive
import pytest
import tokcredit as tc
import torch

EXPECTED = {
    "kl": 0.248638,
    "k3_kl": 0.097468,
    "training_ppl": 3.701585,
    "rollout_ppl": 2.886744,
    "log_ppl_diff": (0.075026 + 0.480121) / 2,
    "log_ppl_abs_diff": (0.075026 + 0.480121) / 2,
    "log_ppl_diff_max": 0.480121,
    "log_ppl_diff_min": 0.075026,
    "ppl_ratio": 1.347091,
    "chi2_token": -0.210140,
    "chi2_seq": -0.697604,
}


@pytest.mark.parametrize("packed", [False, True])
def test_by_hand(packed):
    batch, _ = naive.two_rows()
    old, engine, spans = batch.old_log_probs, batch.rollout_log_probs, batch.spans
    if packed:
        keep = batch.response_mask
        old, engine, spans = old[keep], engine[keep], tc.Spans.from_cu_seqlens(torch.tensor([0, 4, 7]))
    found = tc.mismatch.statistics(old, engine, spans)
    assert {name: x.item() for name, x in found.items()} == pytest.approx(EXPECTED, abs=2e-6)
    assert all(x.dtype == torch.float64 for x in found.values())


@pytest.mark.parametrize(
    ("weight", "ess"),
    [
        (tc.token_weights.tis(), 0.912204),
        (tc.token_weights.tis(high=1.1), 0.912851),
        (tc.token_weights.icepop(low=0.5, high=2.0), 0.846627),
    ],
)
def test_effective_sample_size(weight, ess):
    batch, _ = naive.two_rows()
    weights = weight(batch, batch.rewards[:, None])
    found = tc.mismatch.statistics(batch.old_log_probs, batch.rollout_log_probs, batch.spans, weights)
    assert found["ess"].item() == pytest.approx(ess, abs=1e-6)


def test_missing_log_probs_and_empty_batches():
    batch, _ = naive.two_rows()
    nothing = torch.full_like(batch.old_log_probs, math.nan)
    found = tc.mismatch.statistics(batch.old_log_probs, nothing, batch.spans)
    assert found.pop("training_ppl") == found.pop("rollout_ppl") > 1
    assert found.pop("ppl_ratio") == 1 and not any(found.values())
    masked = batch.spans.with_mask(torch.zeros(10, dtype=torch.bool))
    weights = torch.ones(2, 1)
    empty = tc.mismatch.statistics(batch.old_log_probs, batch.rollout_log_probs, masked, weights)
    assert all(x.isfinite() for x in empty.values()) and empty["kl"] == empty["ess"] == 0


def test_bad_input():
    batch, _ = naive.two_rows()
    with pytest.raises(ValueError, match=r"engine_log_probs: expected .*\[10\], got .*\[9\]"):
        tc.mismatch.statistics(batch.old_log_probs, batch.rollout_log_probs[1:], batch.spans)
    with pytest.raises(TypeError, match="spans: expected"):
        tc.mismatch.statistics(batch.old_log_probs, batch.rollout_log_probs, None)
