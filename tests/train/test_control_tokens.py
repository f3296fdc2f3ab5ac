"""MEET: which control tokens a response has, what trains when, and what is saved."""

import pytest
import torch
from test_example_trainer import PAIRS, on_pairs  # noqa: F401 - a fixture
from test_experiment import TIMES
from tokcredit.train import ObjectiveSettings, adapter, checkpoint, models, run
from tokcredit.train.example_trainer import ExampleTrainer
from tokcredit.train.experiment import resolved
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer
from tokcredit.train.virtual_tokens import FIRST, VirtualTokens

peft = pytest.importorskip("peft")


@pytest.fixture
def meet(on_pairs):  # noqa: F811
    """A run with two control tokens, which train alone in the first step."""

    def make(**changes):
        file = on_pairs().pairs
        defaults = {"pairs": None, "completions": file, "imitate": "both", "adapter": "control(tokens=2, steps=1)"}
        return on_pairs("meet", **(defaults | changes))

    return make


def embedded(model, prompt, tokens, kind):
    """Logits of a response after control tokens, from embeddings that are put together here."""
    embeddings = model.model.embed_tokens
    control = embeddings.prompt[2 * kind : 2 * kind + 2]
    given = torch.cat([control, embeddings.base(torch.tensor(prompt + tokens))])[None]
    return model(inputs_embeds=given).logits[0, len(prompt) + 1 : -1]


def test_each_response_has_the_control_tokens_of_its_side(meet):
    trainer = ExampleTrainer(resolved(meet()))
    trainer.step(1)
    batch = trainer._batch([0, 1, 2])
    found = score(trainer.model, batch)[0].detach().split(batch.sizes.tolist())
    rows = [(e.prompt[2:], x.tokens, kind) for e in trainer._examples[:3] for kind, x in enumerate(e.responses)]
    for (prompt, tokens, kind), row in zip(rows, found, strict=True):
        expected = (
            embedded(trainer.model, prompt, tokens, kind).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
        )
        torch.testing.assert_close(row, expected[:, 0], rtol=1e-4, atol=1e-4)
    mean = -torch.cat(found).mean()
    assert trainer.learner.measure(batch)["loss"] == pytest.approx(float(mean), rel=1e-4)


def test_control_tokens_train_first_and_then_the_model(meet):
    trainer = ExampleTrainer(resolved(meet()))

    def changed(number):
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        loss = trainer.step(number).metrics["loss"]
        now = dict(trainer.model.named_parameters())
        rows = (now["model.embed_tokens.prompt"] != before["model.embed_tokens.prompt"]).any(1)
        assert rows.all(), "good and bad ones train"
        return {name for name in now if not torch.equal(now[name], before[name])}, loss

    assert changed(1)[0] == {"model.embed_tokens.prompt"}
    assert changed(2)[0] == {name for name, _ in trainer.model.named_parameters()}


def test_responses_are_generated_after_the_good_control_tokens(meet):
    trainer = ExampleTrainer(resolved(meet(tasks=("addition(digits=1)",), reward="uniform:digest")))
    with torch.no_grad():
        trainer.model.model.embed_tokens.prompt.mul_(20)
    context = trainer._tasks[0]
    prompt = context.prompt("3+4=")
    assert prompt[:2] == [FIRST, FIRST + 1]
    sampler = TransformersSampler(trainer.model, trainer.tokenizer)
    tokens = sampler.sample([prompt], 1, 5, 0.0).tokens.tolist()
    with torch.no_grad():
        best = embedded(trainer.model, prompt[2:], tokens, 0).argmax(-1).tolist()
        other = embedded(trainer.model, prompt[2:], tokens, 1)
    assert tokens == best
    assert not other.allclose(embedded(trainer.model, prompt[2:], tokens, 0), atol=0.01)


@pytest.mark.parametrize("done", [1, 2])
def test_a_run_goes_on_from_its_folder(meet, tmp_path, done):
    """Also where the model begins to train."""
    s = resolved(meet(steps=3, output=tmp_path))
    first = ExampleTrainer(s)
    for number in range(1, done + 1):
        first.step(number)
    checkpoint.save(first.accelerator, tmp_path, done)
    second = ExampleTrainer(s)
    assert checkpoint.load(second.accelerator, tmp_path) == done
    for number in range(done + 1, 4):
        a, b = ({k: v for k, v in x.step(number).metrics.items() if k not in TIMES} for x in (first, second))
        assert a == b


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_is_saved(meet, tmp_path):
    """A model without control tokens, and both kinds of these, which peft puts before a prompt."""
    trainer = ExampleTrainer(resolved(meet()))
    for number in (1, 2):
        trainer.step(number)
    adapter.save(trainer.model, tmp_path)
    trainer.tokenizer.save_pretrained(tmp_path)
    embeddings = trainer.model.model.embed_tokens
    assert isinstance(embeddings, VirtualTokens), "the run may go on"
    prompt = trainer.tokenizer("1+2=").input_ids
    for kind, name in enumerate(("good", "bad")):
        saved, _ = models.load(str(tmp_path))
        assert saved.model.embed_tokens.weight.equal(embeddings.base.weight)
        trained = peft.PeftModel.from_pretrained(saved, str(tmp_path / name))
        with torch.no_grad():
            found = trained(input_ids=torch.tensor([prompt])).logits[0, -1]
            expected = embedded(trainer.model, prompt, [0], kind)[-1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


TOGETHER = "method, imitate, adapter: expected meet, both and control(...) together, or none of them, got"


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": None},
        {"adapter": "prompt(tokens=2)"},
        {"imitate": "chosen"},
        {"objective": ObjectiveSettings("sft")},
        {"objective": ObjectiveSettings("sft"), "imitate": "chosen"},
    ],
)
def test_settings_that_belong_together(meet, changes):
    with pytest.raises(ValueError) as error:
        run(meet(**changes))
    assert str(error.value).startswith(TOGETHER)


@pytest.mark.parametrize("method", ["meet", "grpo"])
def test_rollouts_have_no_sides(settings, method):
    with pytest.raises(ValueError, match="completions: expected a file of pairs because of meet and its adapter"):
        Trainer(resolved(settings(method, adapter="control(tokens=2)" if method == "grpo" else None)))


def test_the_number_of_pairs(meet):
    trainer = ExampleTrainer(resolved(meet()))
    assert [[x.text for x in e.responses] for e in trainer._examples] == [
        [row["chosen"], row["rejected"]] for row in PAIRS
    ]
