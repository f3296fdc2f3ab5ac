"""Against TRL's ``DPOTrainer``: the same pairs through both trainers give the same losses, gradients and metrics."""

import inspect
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import tokcredit as tc
import torch

pytest.importorskip("trl", reason="TRL is not installed; make test-trl")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
import transformers
import trl
from datasets import Dataset
from tokcredit.adapters.trl import CreditDPOTrainer
from tokcredit.stages.link import logistic
from trl_run import SETTINGS, Gradients, start

PARITY = {
    "sigmoid": (tc.methods.dpo(beta=0.3), dict(beta=0.3)),
    "sigmoid_norm": (tc.methods.sigmoid_norm(0.7), dict(loss_type=["sigmoid_norm"], beta=0.7)),
    "ipo": (tc.methods.ipo(0.3), dict(loss_type=["ipo"], beta=0.3)),
    "weighted": (tc.mix("dpo", link=logistic(0.3), pair_weights="on_policy()"), dict(beta=0.3, use_weighting=True)),
    "both": (
        tc.Preference(link=tc.link.both(logistic(0.3), tc.link.hinge(0.3), 0.8, 0.3)),
        dict(loss_type=["sigmoid", "hinge"], loss_weights=[0.8, 0.3], beta=0.3),
    ),
    "robust": (tc.Preference(link=tc.link.robust(0.3, 0.1)), dict(loss_type=["robust"], beta=0.3, label_smoothing=0.1)),
}
"""For each of TRL's losses the objective that has it, and TRL's settings."""
SHARED = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "rewards/accuracies", "entropy", "logps/chosen")
NUMBERS = torch.Generator().manual_seed(0)


def sums(count):
    """Pairs of different lengths."""
    rows = torch.randint(0, 10, (count, 12), generator=NUMBERS).tolist()
    texts = [
        ("".join(map(str, row[:3])) + "=", "".join(map(str, row[3 : 4 + row[0] % 5])), str(row[9])) for row in rows
    ]
    return Dataset.from_list([dict(prompt=p, chosen=c, rejected=r + "+") for p, c, r in texts])


DATA = sums(24)


def train(kind, folder, settings, config=trl.DPOConfig, data=DATA, **keywords):
    """Trainer, and the gradients of its steps."""
    gradients = Gradients()
    args = config(str(folder), **(SETTINGS | dict(max_steps=3, learning_rate=0.02) | settings))
    keywords |= dict(train_dataset=data, processing_class=tiny.tokenizer(), callbacks=[gradients])
    trainer = kind(start(folder), args=args, **keywords)
    trainer.train()
    return trainer, gradients.steps


def equal(ours, theirs, compared=SHARED):
    (trainer, gradients), (stock, expected) = ours, theirs
    assert len(gradients) == len(expected) == 3
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() <= 5e-5 * b.norm() + 1e-6
    assert max(b.norm() for b in expected) > 1e-2, "a comparison of zeros proves nothing"
    for a, b in zip(trainer.state.log_history[:-1], stock.state.log_history[:-1], strict=True):
        for name in compared:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("precompute", [False, True])
def test_equals_stock_trl(name, precompute, tmp_path):
    objective, settings = PARITY[name]
    shared = dict(precompute_ref_log_probs=precompute, beta=settings["beta"])
    ours = train(CreditDPOTrainer, tmp_path, shared, objective=objective)
    theirs = train(trl.DPOTrainer, tmp_path, settings | shared)
    equal(ours, theirs)
    assert ours[0].state.log_history[2]["loss"] != ours[0].state.log_history[0]["loss"]


@pytest.mark.parametrize("precompute", [False, True])
def test_lora(precompute, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear")
    shared = dict(precompute_ref_log_probs=precompute, beta=0.3)
    ours = train(CreditDPOTrainer, tmp_path, shared, objective=PARITY["sigmoid"][0], peft_config=adapter)
    theirs = train(trl.DPOTrainer, tmp_path, shared, peft_config=adapter)
    equal(ours, theirs)
    assert ours[0].ref_model is None and len(ours[1][0]) < sum(p.numel() for p in ours[0].model.parameters())


def test_files_of_tokcredit_pairs(tmp_path):
    """Token ids in the file do not disturb TRL, which makes its own from the texts."""
    named = DATA.map(lambda row: {name: [9, 9] for name in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask")})
    ours = train(CreditDPOTrainer, tmp_path, dict(beta=0.3), data=named, objective=PARITY["sigmoid"][0])
    equal(ours, train(trl.DPOTrainer, tmp_path, dict(beta=0.3)))


def test_truncated_rows(tmp_path):
    settings = dict(max_length=7, beta=0.3, precompute_ref_log_probs=True)
    ours = train(CreditDPOTrainer, tmp_path, settings, objective=PARITY["sigmoid"][0])
    equal(ours, train(trl.DPOTrainer, tmp_path, settings))


def test_evaluation_equals_stock_trl(tmp_path):
    settings = dict(eval_strategy="steps", eval_steps=1, precompute_ref_log_probs=True, beta=0.3)
    more = dict(data=DATA.select(range(16)), eval_dataset=DATA.select(range(16, 24)))
    ours, _ = train(CreditDPOTrainer, tmp_path, settings, objective=PARITY["sigmoid"][0], **more)
    theirs, _ = train(trl.DPOTrainer, tmp_path, settings, **more)
    found = [[line for line in x.state.log_history if "eval_loss" in line] for x in (ours, theirs)]
    assert len(found[0]) == len(found[1]) == 3
    for a, b in zip(*found, strict=True):
        for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5)
        assert a["eval_tokcredit/accuracy_mean"] == pytest.approx(b["eval_rewards/accuracies"])


def test_token_weights(tmp_path):
    """A method that TRL lacks: the weights of the tokens multiply log-ratios one by one."""
    objective = tc.methods.dpo(beta=0.3, token_weights=(first_tokens(),))
    for precompute in (False, True):
        settings = dict(precompute_ref_log_probs=precompute, max_steps=1, learning_rate=0.0)
        trainer, (gradient,) = train(
            CreditDPOTrainer, tmp_path, settings, data=DATA.select(range(8)), objective=objective
        )
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        # Where the policy is the reference, the gradient is that of the weighted log-probs.
        assert gradient.norm() > 1e-2
        torch.testing.assert_close(gradient, by_hand(list(trainer.train_dataset)), rtol=1e-3, atol=1e-6)


@dataclass(frozen=True)
class first_tokens(tc.token_weights.TokenWeight):
    """Twice the weight for the first token of a response, and none for the others."""

    def __call__(self, batch, advantages):
        first = torch.zeros(batch.num_tokens)
        starts = batch.response_mask.view(batch.shape).int().argmax(1) + batch.begin
        first[starts] = 2.0
        return first


def by_hand(rows):
    """Gradient of ``-0.3 / 2 * 2 * (log p of the first chosen token - the same of the rejected)``, mean over pairs."""
    model = tiny.model()
    loss = 0.0
    for row in rows:
        log_probs = model(torch.tensor([row["prompt_ids"]])).logits[0, -1].log_softmax(-1)
        loss = loss - 0.3 * (log_probs[row["chosen_ids"][0]] - log_probs[row["rejected_ids"][0]]) / len(rows)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_a_method_without_a_reference_needs_no_model_of_it(tmp_path):
    objective = tc.Preference(reference=None, normalization="mean", link=logistic(2.0))
    trainer, gradients = train(CreditDPOTrainer, tmp_path, dict(precompute_ref_log_probs=True), objective=objective)
    assert trainer.ref_model is None and not {"ref_chosen_logps"} & set(trainer.train_dataset.column_names)
    assert all(g.norm() > 1e-3 for g in gradients)


WRONG = {
    "loss_type": (
        dict(loss_type=["ipo"]),
        {},
        r"loss_type: expected TRL's default \['sigmoid'\], because the objective",
    ),
    "label_smoothing": (dict(label_smoothing=0.1), {}, "label_smoothing: expected TRL's default 0.0"),
    "beta": (dict(beta=0.2), {}, r"beta: expected 0.3 as in logistic\(beta=0.3"),
    "kind": ({}, dict(objective=tc.methods.grpo()), "objective: expected a tokcredit.Preference, got Objective"),
    "neither": ({}, dict(objective=None), "method, objective: expected exactly one of them, got neither"),
    "inputs": (
        {},
        dict(objective=replace(tc.methods.dpo(), token_weights=(tc.token_weights.tis(),))),
        "objective: expected one that reads no more inputs than DPOTrainer carries .* requires",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name, tmp_path):
    settings, keywords, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        train(CreditDPOTrainer, tmp_path, settings, **({"objective": tc.methods.dpo(beta=0.3)} | keywords))


def test_every_option_and_loss_is_in_the_table():
    """An option or a loss that a later TRL adds fails here until docs/hosts.md says what it is."""
    own = {f.name for f in fields(trl.DPOConfig)} - {f.name for f in fields(transformers.TrainingArguments)}
    own |= set(re.findall(r'loss_type == "(\w+)"', Path(inspect.getfile(trl.DPOTrainer)).read_text()))
    table = (Path(__file__).parents[2] / "docs/hosts.md").read_text().split("\n### TRL, preference pairs\n")[1]
    assert {"aot", "ld_alpha"} < own
    assert not {name for name in own if not re.search(rf"\b{name}\b", table.split("\n### ")[0])}
