"""LoRA: what trains, what the reference is, and what is saved, resumed and merged."""

import pytest
import torch
from resuming import check_resumed
from test_example_trainer import on_pairs  # noqa: F401
from tokcredit.cli import main
from tokcredit.train import ObjectiveSettings, policy, run
from tokcredit.train import adapter as adapters
from tokcredit.train.example_trainer import ExampleTrainer
from tokcredit.train.experiment import resolved
from tokcredit.train.models import load
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer

pytest.importorskip("peft")
LORA = "lora(r=4, alpha=64.0)"
IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def stepped(trainer, steps=2):
    for number in range(1, steps + 1):
        trainer.step(number)
    return trainer.model


def test_only_the_adapter_trains(on_pairs):  # noqa: F811
    trainer = ExampleTrainer(resolved(on_pairs(adapter=LORA)))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    start = logits(trainer.model)
    stepped(trainer)
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert torch.equal(p, before[name]) == ("lora_" not in name), name
    assert not torch.allclose(logits(trainer.model), start, atol=1e-3)
    with adapters.switched_off(trainer.model):
        assert torch.equal(logits(trainer.model), start)
    assert not torch.allclose(logits(trainer.model), start, atol=1e-3)
    assert all(p.requires_grad == ("lora_" in name) for name, p in trainer.model.named_parameters())


def test_the_weights_by_hand(on_pairs):  # noqa: F811
    model = stepped(ExampleTrainer(resolved(on_pairs(adapter=LORA))))
    layer = model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 96) and b.abs().sum() > 0
    merged = adapters.merged_weights(model)
    expected = layer.base_layer.weight + 16 * b @ a
    torch.testing.assert_close(merged["model.layers.0.mlp.up_proj.weight"], expected)
    plain, _ = load("tiny(steps=0)")
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_the_gradient_is_that_of_the_layer(on_pairs, gradients):  # noqa: F811
    """At the start ``B`` is 0, so its gradient is that of the layer times ``A``."""
    target = "'.*layers.1.mlp.down_proj'"
    trainer = ExampleTrainer(resolved(on_pairs(adapter=f"lora(r=4, alpha=8.0, targets={target})")))
    layer = trainer.model.model.layers[1].mlp.down_proj
    a = layer.lora_A["default"].weight.detach().clone()
    trainer.step(1)
    full = ExampleTrainer(resolved(on_pairs()))
    kept = []
    weight = full.model.model.layers[1].mlp.down_proj.weight
    weight.register_post_accumulate_grad_hook(lambda p: kept.append(p.grad.clone()))
    full.step(1)
    of_b = gradients[0][a.numel() :].view(-1, 4)
    torch.testing.assert_close(of_b, 2 * kept[-1] @ a.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("text", [LORA, "prompt(tokens=5)"])
def test_resumed_training_gives_the_numbers_of_an_uninterrupted_one(text, on_pairs, tmp_path):  # noqa: F811
    s = resolved(on_pairs(adapter=text))
    _, first = check_resumed(s, tmp_path, ExampleTrainer, after=(3, 4))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-000002").iterdir()}
    assert not any(name.startswith(("model", "pytorch_model")) for name in sizes)
    assert sizes["adapter.pt"] < sum(p.numel() for p in first.model.parameters())


def saved(trainer, folder):
    """The folder ``model`` of a run, as its end writes it."""
    folder.mkdir(parents=True)
    adapters.save(trainer.model, folder)
    trainer.tokenizer.save_pretrained(folder)
    return str(folder)


def test_merged_models(on_pairs, tmp_path, monkeypatch):  # noqa: F811
    """The folder of an adapter works as a model, also one that was trained on such a folder; merge writes it whole."""
    monkeypatch.chdir(tmp_path)
    trainer = ExampleTrainer(resolved(on_pairs(adapter=LORA)))
    expected = logits(stepped(trainer, 2))
    trained, _ = load(saved(trainer, tmp_path / "first" / "model"))
    assert not adapters.has_one(trained) and all(p.requires_grad for p in trained.parameters())
    torch.testing.assert_close(logits(trained), expected, rtol=1e-4, atol=1e-4)
    main(["merge", "first", "-o", "whole"])
    torch.testing.assert_close(logits(load("whole")[0]), expected, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    second = ExampleTrainer(resolved(on_pairs(model="first/model", adapter=LORA)))
    torch.testing.assert_close(logits(second.model), expected, rtol=1e-4, atol=1e-4)
    again = logits(stepped(second, 1))
    assert (again - expected).abs().max() > 1e-3
    loaded, _ = load(saved(second, tmp_path / "second"))
    torch.testing.assert_close(logits(loaded), again, rtol=1e-4, atol=1e-4)
    for arguments, message in (
        (["first", "-o", "whole"], "--output: expected a new folder, got whole"),
        (["whole", "-o", "new"], "run: expected a finished run with an adapter, or the folder of one, got whole"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["merge", *arguments])
        assert message in str(stopped.value)


def test_policy_gradients(settings, uniform):
    """The reference of a KL term is the model without its adapter, not a copy of it."""
    s = settings("grpo", adapter=LORA, objective=ObjectiveSettings("grpo", terms=("kl(0.5)",)), steps=3)
    trainer = Trainer(resolved(s))
    assert policy.reference(trainer.objective, trainer.model) is trainer.model
    kl = [trainer.step(number).metrics["kl"] for number in (1, 2, 3)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-5
    batch = trainer.learner.with_inputs(trainer.rollout_collector.collect(4).batch)
    plain, _ = load("tiny(steps=0)")
    torch.testing.assert_close(batch.ref_log_probs, score(plain, batch)[0].detach(), rtol=1e-4, atol=1e-4)


def test_the_sampler_has_the_adapter(on_pairs):  # noqa: F811
    trainer = ExampleTrainer(resolved(on_pairs(adapter=LORA)))
    sampler = TransformersSampler(trainer.model, trainer.tokenizer, torch.float64)
    stepped(trainer)
    sampler.sync()
    torch.testing.assert_close(logits(sampler._model).float(), logits(trainer.model), rtol=1e-3, atol=1e-3)


WRONG = {
    "lora(r=0)": "adapter: lora: r: expected a whole number at least 1, got 0",
    "dora": "adapter: expected one of control, lora, prompt, got 'dora'",
    "prompt(0)": "adapter: prompt: tokens: expected a whole number at least 1, got 0",
    "lora(targets='nothing')": "adapter: expected targets in LlamaForCausalLM, got",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_adapters(text, on_pairs):  # noqa: F811
    with pytest.raises(ValueError, match=WRONG[text]):
        run(on_pairs(adapter=text))
