"""TRL's fused output layer computed by ours gives what it gives by itself, alone and in a training run."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed; make test-trl")
sys.path.insert(0, str(Path(__file__).parent))

import scripted
import tiny
import tokcredit as tc
from tokcredit.adapters.trl import CreditGRPOTrainer, use_head
from tokcredit.adapters.trl import head as adapter
from trl.trainer import utils


@pytest.fixture(autouse=True)
def stock(monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)  # what it is afterwards


def case():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 16, (3, 9), generator=g)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    return ids, labels


def results(outputs, dtype=torch.float32, **options):
    model = tiny.model().to(dtype)
    utils.add_fused_lm_head(model, outputs=outputs, **options)
    ids, labels = case()
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    weights = torch.linspace(-1, 1, out.log_probs.numel()).view_as(out.log_probs)
    loss = (out.log_probs * weights).sum()
    if "entropy" in outputs:
        loss = loss + (out.entropy * weights**2).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    fields = (out.log_probs, out.entropy, out.mean_logits, out.is_top1, out.log_sum_sq_probs)
    return [*fields, *gradients]


@pytest.mark.parametrize(
    ("outputs", "options", "dtype", "ours"),
    [
        (("log_probs",), {}, torch.float32, True),
        (("log_probs", "entropy"), {"temperature": 0.7}, torch.float32, True),
        (("log_probs", "entropy"), {"cast_lm_head_to_fp32": True}, torch.bfloat16, True),
        (("log_probs", "entropy", "is_top1"), {}, torch.float32, False),
    ],
)
def test_equals_stock_trl(outputs, options, dtype, ours, monkeypatch):
    expected = results(outputs, dtype, **options)
    seen = []
    original = adapter.head.log_probs_and_entropies
    monkeypatch.setattr(adapter.head, "log_probs_and_entropies", lambda *x, **y: seen.append(1) or original(*x, **y))
    use_head()
    found = results(outputs, dtype, **options)
    assert seen == [1] * ours
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # The gradients of the body are bfloat16 where the model is.
            assert (a.double() - b.double()).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.double().norm()


def test_scaled_and_capped_logits():
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=g, requires_grad=True) for size in ((12, 8), (30, 8), (30,))]
    targets = torch.randint(0, 30, (12,), generator=g)

    def run():
        function = utils._ChunkedLogProbFunction
        found = function.apply(*made, targets, 0.8, 7, 3.0, 1.5, ("log_probs", "entropy"))
        return [*found[:2], *torch.autograd.grad((found[0] * 2).sum() + found[1].sin().sum(), made)]

    expected = run()
    use_head()
    use_head()
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_training_run(tmp_path):
    """The gradients of four optimizer steps, with a ratio of whole rows and a bonus of entropy."""
    objective = tc.mix("gspo", terms=("entropy(0.05)",))
    _, expected = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path), objective=objective)
    use_head()
    _, found = scripted.train(CreditGRPOTrainer, scripted.arguments(tmp_path), objective=objective)
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 5e-5 * b.norm() + 1e-6 and b.norm() > 1e-3


def test_a_version_without_the_layer(monkeypatch):
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match="trl: expected a version with a fused output layer"):
        use_head()
