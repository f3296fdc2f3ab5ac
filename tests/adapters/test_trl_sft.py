"""Against TRL's ``SFTTrainer``: plain SFT is the same, and selected tokens train as the formula says."""

import sys
from pathlib import Path

import pytest
import tokcredit as tc
import torch

pytest.importorskip("trl", reason="TRL is not installed; make test-trl")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
import trl
from test_trl_dpo import DATA, equal, train
from tokcredit.adapters.trl import CreditSFTTrainer

ROWS = DATA.rename_column("chosen", "completion").remove_columns("rejected")
SHARED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
SELECTED = tc.Supervised(filters=(tc.filters.top_share(0.5, tc.token_score.given("entropies")),))


def sft(kind, folder, data=ROWS, settings=(), **keywords):
    return train(kind, folder, dict(settings), trl.SFTConfig, data, **keywords)


@pytest.mark.parametrize("method", [{"method": "sft"}, {"objective": tc.Supervised()}], ids=str)
def test_equals_stock_trl(method, tmp_path):
    """The rows of an optimizer step have different lengths, so means of micro-batches would be another loss."""
    equal(sft(CreditSFTTrainer, tmp_path, **method), sft(trl.SFTTrainer, tmp_path), SHARED)


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear")
    ours = sft(CreditSFTTrainer, tmp_path, method="sft", peft_config=adapter)
    equal(ours, sft(trl.SFTTrainer, tmp_path, peft_config=adapter), SHARED)


def test_selected_tokens(tmp_path):
    """Half of the tokens train, those with the highest entropy; the others stay in the denominator."""
    data, settings = (
        ROWS.select(range(8)),
        dict(max_steps=1, gradient_accumulation_steps=1, per_device_train_batch_size=8),
    )
    trainer, (gradient,) = sft(CreditSFTTrainer, tmp_path, data, settings, objective=SELECTED)
    model, found = tiny.model(), []
    for row in trainer.train_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"][1:]
        rows = model(ids).logits[0, :-1].log_softmax(-1)
        for t, label in enumerate(labels):
            if label != -100:
                found.append((-(rows[t].exp() * rows[t]).sum(), -rows[t, label]))
    entropies = torch.stack([entropy for entropy, _ in found])
    kept = entropies.detach().argsort(descending=True)[: -(-len(found) // 2)]
    loss = torch.stack([found[i][1] for i in kept]).sum() / len(found)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert trainer.state.log_history[0]["tokcredit/kept_fraction"] == pytest.approx(len(kept) / len(found))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


WRONG = {
    "packing": (dict(packing=True), {}, "packing: expected TRL's default False, because the objective takes one"),
    "dft": (dict(loss_type="dft"), {}, "loss_type: expected TRL's default 'nll', because the objective makes the loss"),
    "kind": ({}, dict(method="dpo"), "objective: expected a tokcredit.Supervised, got Preference"),
    "teacher": ({}, dict(method="tip"), "objective: expected one that reads no more inputs than SFTTrainer carries"),
    "rows": (
        {},
        dict(objective=tc.Supervised(aggregation=tc.aggregation.sequence_mean())),
        "aggregation: expected a mean over tokens, whose number TRL knows, got sequence_mean",
    ),
    "function": (
        {},
        dict(method="sft", compute_loss_func=len),
        "compute_loss_func: expected None because the objective",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name, tmp_path):
    settings, keywords, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        sft(CreditSFTTrainer, tmp_path, settings=settings, **({} if keywords else {"method": "sft"}), **keywords)
