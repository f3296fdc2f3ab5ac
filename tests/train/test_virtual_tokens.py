"""Prompt tuning: what trains, what the reference sees, and what is saved."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from test_example_trainer import on_pairs  # noqa: F401
from test_experiment import numbers
from tokcredit.train import CriticSettings, ObjectiveSettings, run
from tokcredit.train import adapter as adapters
from tokcredit.train.example_trainer import ExampleTrainer
from tokcredit.train.experiment import resolved
from tokcredit.train.models import load
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer
from tokcredit.train.virtual_tokens import FIRST

peft = pytest.importorskip("peft")
PROMPT = "prompt(tokens=5)"
IDS = torch.arange(3, 15)[None]


def test_only_the_virtual_tokens_train(on_pairs):  # noqa: F811
    trainer = ExampleTrainer(resolved(on_pairs(adapter=PROMPT)))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert all(example.prompt[:5] == [FIRST + i for i in range(5)] for example in trainer._examples)
    margins = [trainer.measure()["held_out_margin_mean"]]
    for number in (1, 2, 3):
        trainer.step(number)
        margins.append(trainer.measure()["held_out_margin_mean"])
    changed = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.embed_tokens.prompt"] and margins == sorted(margins)
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.base.weight


def test_the_log_probs_by_hand(on_pairs):  # noqa: F811
    """Against embeddings that are put together here, row by row; the reference sees no virtual tokens."""
    trainer = ExampleTrainer(resolved(on_pairs(adapter=PROMPT)))
    trainer.step(1)
    plain, _ = load("tiny(steps=0)")
    batch = trainer._batch([0, 1, 2])
    log_probs = score(trainer.model, batch)[0].split(batch.sizes.tolist())
    reference = batch.ref_log_probs.split(batch.sizes.tolist())
    rows = [(e.prompt[5:], x.tokens) for e in trainer._examples[:3] for x in e.responses]
    for (prompt, response), found, of_reference in zip(rows, log_probs, reference, strict=True):
        ids = torch.tensor([prompt + response])
        virtual = trainer.model.model.embed_tokens.prompt[None]
        given = torch.cat([virtual, plain.get_input_embeddings()(ids)], 1)
        for logits, seen in ((plain(inputs_embeds=given).logits[0, 5:], found), (plain(ids).logits[0], of_reference)):
            expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_other_models_may_have_more_embeddings(settings, uniform, tmp_path):
    """Ids that are padding of another model are no virtual tokens, which it has itself or does not see."""
    model, words = load("tiny(steps=0, seed=1)")
    model.resize_token_embeddings(len(words) + 11, mean_resizing=False)
    for part in (model, words):
        part.save_pretrained(tmp_path / "other")
    other = str(tmp_path / "other")
    trainer = Trainer(resolved(settings("rto", adapter=PROMPT, aligned=other, critic=CriticSettings(other))))
    batch = trainer.rollout_collector.collect(1).batch
    prompts = batch.input("prompt_tokens")
    with torch.no_grad():
        expected = score(model, batch.with_inputs(prompt_tokens=torch.where(prompts < FIRST, prompts, -1)))[0]
    found = trainer.learner.with_inputs(batch).input("aligned_log_probs")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    embeddings = trainer.learner._further["critic"].model.get_input_embeddings()
    assert torch.equal(embeddings(prompts[:1, -15:][prompts[:1, -15:] >= FIRST]), embeddings.prompt)


def test_sampling_sees_the_virtual_tokens(settings):
    """Greedy responses of the sampler's copy are those of embeddings that are put together here."""
    trainer = Trainer(resolved(settings("grpo", adapter=PROMPT)))
    prompt = trainer.context.prompt("3+4=")
    with torch.no_grad():
        trainer.model.model.embed_tokens.prompt.mul_(20)
    sampler = TransformersSampler(trainer.model, trainer.tokenizer, torch.float32)
    made = sampler.sample([prompt, prompt[:5] + prompt[7:]], 1, 4, 0.0)
    plain, _ = load("tiny(steps=0)")
    ids = torch.tensor([prompt[5:]])
    for token in made.tokens[: made.cu_seqlens[1]]:
        virtual = trainer.model.model.embed_tokens.prompt[None]
        given = torch.cat([virtual, plain.get_input_embeddings()(ids)], 1)
        logits = plain(inputs_embeds=given).logits[0, -1]
        assert logits[token] > logits.max() - 1e-3
        ids = torch.cat([ids, token.view(1, 1)], 1)


def test_policy_gradients(settings, uniform):
    s = settings(adapter=PROMPT, objective=ObjectiveSettings("grpo", terms=("kl(0.5)",)), steps=2)
    run(s)
    lines = numbers(s.output)[1:]
    assert lines[0]["kl"] > 1e-5, "the virtual tokens begin as random tokens, which the reference does not see"
    rows = pq.read_table(s.output / "rollouts-000002.parquet").to_pylist()
    assert all(max(row["prompt_tokens"]) < 99 for row in rows)


def test_what_is_saved_is_peft_s_prompt_tuning(on_pairs, tmp_path):  # noqa: F811
    trainer = ExampleTrainer(resolved(on_pairs(adapter=PROMPT)))
    trainer.step(1)
    adapters.save(trainer.model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING" and config["num_virtual_tokens"] == 5
    with pytest.warns(FutureWarning):
        theirs = peft.PeftModel.from_pretrained(load("tiny(steps=0)")[0], str(tmp_path))
    ids = torch.cat([torch.tensor([adapters.prefix(trainer.model)]), IDS], 1)
    ours = trainer.model(ids).logits[:, 5:]
    torch.testing.assert_close(theirs(IDS).logits[:, 5:], ours, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="model: expected an adapter that can be merged, LoRA, got PROMPT_TUNING in"):
        load(str(tmp_path))
