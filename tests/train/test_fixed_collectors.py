"""Inputs that the trainer collects for methods on pairs and completions, against models that are called row by row."""

import json

import pytest
import tokcredit as tc
import torch
from test_example_trainer import PAIRS, completions, on_pairs  # noqa: F401 - a fixture
from test_experiment import TIMES
from tokcredit import report
from tokcredit.methods.tab_po import field_weights
from tokcredit.train import (
    CollectorSettings,
    ObjectiveSettings,
    SamplingSettings,
    Settings,
    activations,
    checkpoint,
    compare,
    example_trainer,
    fixed_collectors,
    models,
    run,
)
from tokcredit.train.example_trainer import ExampleTrainer
from tokcredit.train.examples import Example
from tokcredit.train.examples import batch_of as batch_of_examples
from tokcredit.train.experiment import resolved
from tokcredit.train.fixed_collectors import FixedCollectors
from tokcredit.train.instructions import instructions
from tokcredit.train.problems import Message
from tokcredit.train.trainer import Trainer

POSITIVE, NEGATIVE = "tiny(steps=0, seed=1)", "tiny(steps=0, seed=2)"
COLLECTORS = {
    "tgdpo": CollectorSettings(),
    "cdpo": CollectorSettings(positive=POSITIVE, negative=NEGATIVE, contrast=0.7),
    "t_reg": CollectorSettings(better_template="Good: {question}", worse_template="Bad {response}: {question}"),
    "align_distil": CollectorSettings(reverse_teacher=NEGATIVE),
    "mapl": CollectorSettings(instructions=3, instructions_template="{instructions}|{question}"),
}
TEACHERS = {"sstoken refreshed": "ema(0.5)", "align_distil": POSITIVE}
SETTINGS = {
    "tab_po": ("variant=v1",),
    "sparse_po": (),
    "sparse_po learned": ("learned=true", "independent=true", "l1_reward=0.01"),
    "sstoken": (),
    "sstoken refreshed": ("history=teacher_log_probs",),
    **dict.fromkeys(COLLECTORS, ()),
}


@pytest.fixture
def made(on_pairs):  # noqa: F811
    """Settings of a run of a method whose name may be followed by what is special about it."""

    def make(name, rows=None, **changes):
        method = name.split()[0]
        supervised = isinstance(tc.methods.load(method), tc.Supervised)
        defaults = {
            "objective": ObjectiveSettings(method, set=SETTINGS[name]),
            "collectors": COLLECTORS.get(method, CollectorSettings()),
            "teacher": TEACHERS.get(name),
            "aligned": POSITIVE if method == "tgdpo" else None,
        }
        return on_pairs(method, rows or (completions() if supervised else PAIRS), **(defaults | changes))

    return make


def batch_of(trainer):
    """The examples of a batch and the batch."""
    numbers = trainer._chosen(1)
    return [trainer._examples[i] for i in numbers], trainer._batch(numbers)


def rows_of(examples):
    return [(e, x) for e in examples for x in e.responses]


@torch.no_grad()
def logits(model, prompt, response, **settings):
    """Logits that predict the tokens of one response, and all else that the model returns."""
    out = model(torch.tensor([prompt + response]), **settings)
    return out.logits[0, len(prompt) - 1 : -1].double(), out


def log_probs(model, prompt, response):
    rows = logits(model, prompt, response)[0].log_softmax(-1)
    return rows.gather(1, torch.tensor(response)[:, None])[:, 0]


def check(batch, name, expected):
    torch.testing.assert_close(batch.input(name).double(), torch.cat(expected).double(), rtol=1e-4, atol=1e-5)


def test_log_probs_of_an_aligned_model(made):
    trainer = ExampleTrainer(resolved(made("tgdpo")))
    examples, batch = batch_of(trainer)
    aligned, _ = models.load(POSITIVE)
    check(batch, "aligned_log_probs", [log_probs(aligned, e.prompt, x.tokens) for e, x in rows_of(examples)])
    check(batch, "ref_log_probs", [log_probs(trainer.model, e.prompt, x.tokens) for e, x in rows_of(examples)])
    assert not batch.input("aligned_log_probs").allclose(batch.input("ref_log_probs"), atol=0.01)


def test_contrastive_log_probs(made):
    trainer = ExampleTrainer(resolved(made("cdpo", sampling=SamplingSettings(prompts=4, temperature=0.8))))
    examples, batch = batch_of(trainer)
    both = [models.load(text)[0] for text in (POSITIVE, NEGATIVE)]
    expected = []
    for e, x in rows_of(examples):
        p, n = (logits(model, e.prompt, x.tokens)[0] / 0.8 for model in both)
        contrasted = (1.7 * p.log_softmax(-1) - 0.7 * n.log_softmax(-1)).log_softmax(-1)
        expected.append(contrasted.gather(1, torch.tensor(x.tokens)[:, None])[:, 0])
    check(batch, "contrastive_log_probs", expected)


def test_log_probs_under_revised_prompts(made):
    trainer = ExampleTrainer(resolved(made("t_reg")))
    examples, batch = batch_of(trainer)

    def under(text, x):
        return log_probs(trainer.model, trainer.tokenizer(text).input_ids, x.tokens)

    rows = rows_of(examples)
    check(batch, "better_log_probs", [under(f"Good: {e.question}", x) for e, x in rows])
    check(batch, "worse_log_probs", [under(f"Bad {x.text}: {e.question}", x) for e, x in rows])
    # The token reward is above 0 where the better prompt makes the token likelier.
    reward = trainer.objective.pair_terms[0].reward(batch)
    assert ((reward > 0) == (batch.input("better_log_probs") > batch.input("worse_log_probs"))).all()


def test_distances_of_two_teachers(made):
    """In the batch, and in the loss with the divergence from the teacher that is made of both."""
    trainer = ExampleTrainer(resolved(made("align_distil", sampling=SamplingSettings(prompts=4, temperature=0.8))))
    examples, batch = batch_of(trainer)
    both = [models.load(text)[0] for text in (POSITIVE, NEGATIVE)]
    distances, losses = [], []
    for e, x in rows_of(examples):
        first, second, student = (logits(m, e.prompt, x.tokens)[0] / 0.8 for m in (*both, trainer.model))
        distances.append((first.softmax(-1) - second.softmax(-1)).abs().sum(-1))
        alpha = 10 * distances[-1] + 1e-3
        target = (first + alpha[:, None] * (first - second)).log_softmax(-1)
        divergence = (student.softmax(-1) * (student.log_softmax(-1) - target)).sum(-1)
        losses.append((0.1 / alpha * divergence).mean())
    check(batch, "teacher_distance", distances)
    assert torch.cat(distances).std() > 0.01
    assert trainer.step(1).metrics["loss"] == pytest.approx(float(sum(losses) / len(losses)), rel=1e-4)


def test_two_teachers_on_rollouts(settings, uniform):
    """Their distance is found before the update, and their extrapolation in the loss."""
    others = {"teacher": POSITIVE, "collectors": COLLECTORS["align_distil"]}
    trainer = Trainer(resolved(settings("align_distil", **others)))
    step = trainer.step(1)
    batch, (first, second) = step.update.prepared.batch, (models.load(x)[0] for x in (POSITIVE, NEGATIVE))
    own = [t for t in batch.input("prompt_tokens")[0].tolist() if t >= 0]
    tokens = batch.tokens[batch.begin[0] : batch.end[0]].tolist()
    p, q = (logits(m, own, tokens)[0].softmax(-1) for m in (first, second))
    found = batch.input("teacher_distance")[batch.begin[0] : batch.end[0]].double()
    torch.testing.assert_close(found, (p - q).abs().sum(-1), rtol=1e-4, atol=1e-5)
    assert step.metrics["grad_norm"] > 0 and step.metrics["reverse_kl_mean"] > 0


def test_instructions_of_pairs(made):
    """Every pair gives two pairs of prompts and a group of four, whose instructions hold where they should."""
    rows = [{"prompt": f"{i}=", "chosen": "one two", "rejected": "three four five"} for i in range(8)]
    trainer = ExampleTrainer(resolved(made("mapl", rows, steps=8)))
    found, words = trainer._examples, trainer.tokenizer
    assert [len(x.responses) for x in found] == [2, 2, 2, 4] * 8
    assert [x.compares_prompts for x in found] == [False, True, True, False] * 8
    assert all(len({4 * n + i in trainer._train for i in range(4)}) == 1 for n in range(8))
    for n in range(8):
        pair, first, second, four = found[4 * n : 4 * n + 4]
        assert [x.text for x in first.responses + second.responses] == ["one two"] * 2 + ["three four five"] * 2
        for made_of, (better, worse) in zip(pair.responses, (first.responses, second.responses), strict=True):
            assert better.tokens == worse.tokens == made_of.tokens and better.question != worse.question
            assert all(followed(better.question, made_of.text)) and not all(followed(worse.question, made_of.text))
        z_best, worst, best, z_worst = four.responses
        assert (best, worst) == tuple(pair.responses) and z_best.question == z_worst.question
        assert all(followed(z_best.question, "one two"))
        assert not any(followed(z_best.question, "three four five"))
        for example in (first, second, four):
            for question, prompt, _ in example.rows:
                assert words.decode(prompt) == question and question.endswith(f"{n}=")
    batch = trainer._batch([0, 1, 3])
    assert batch.rewards.tolist() == [1, 0, 1, 0, 1, 1, 0, 0]
    assert batch.input("prompt_pairs").tolist() == [False] * 2 + [True] * 2 + [False] * 4
    shown = [row for x in (found[0], found[1], found[3]) for row in x.rows]
    check(batch, "ref_log_probs", [log_probs(trainer.model, prompt, x.tokens) for _, prompt, x in shown])


def followed(question, text):
    """Whether a response follows each instruction of a prompt."""
    known = {x.text: x.holds for x in instructions(["one two", "three four five"])}
    asked = [f"{x}." for x in question.partition("|")[0].removesuffix(".").split(". ")]
    assert 1 <= len(asked) <= 3 and len(set(asked)) == len(asked)
    return [known[x](text) for x in asked]


def test_the_report_of_a_run_on_prompts(made):
    """It shows pairs of prompts and groups of four under the method that trained on them."""
    s = made("mapl", steps=1)
    assert run(s)["steps"] == 1
    found = report.read(s.output)
    assert set(found.batch.groups.sizes.tolist()) == {2, 4}
    assert found.batch.input("prompt_pairs").any() and (s.output / "report.html").exists()


def test_every_text_follows_some_instructions_and_not_others():
    for texts in (["", "a"], ["a b", "a  b"], ["12", "21"], ["x", "x"], ["a b c", "c b a"]):
        known = instructions(texts)
        assert len({x.text for x in known}) == len(known)
        for text in texts:
            assert {x.holds(text) for x in known} == {True, False}
    told = {x.text for x in instructions(["a b c", "c b a"]) if x.holds("a b c") and not x.holds("c b a")}
    assert told == {"Begin with the word a.", "End with the word c."}


def test_instructions_that_do_not_fit_are_left_out(made):
    """Of responses of one text no instruction tells them apart; a prompt may be too long for the model."""
    rows = [
        {"prompt": f"{i}=", "chosen": "ab", "rejected": "ab", "prompt_ids": [4 + i], "chosen_ids": [13, 14]}
        | {"rejected_ids": [13, 14, 1]}
        for i in range(8)
    ]
    trainer = ExampleTrainer(resolved(made("mapl", rows)))
    assert [len(x.responses) for x in trainer._examples] == [2, 2, 2] * 8
    assert "follow the same ones: 8" in trainer.introduction
    long = CollectorSettings(instructions_template="{question}{instructions}" + "x" * 1100)
    trainer = ExampleTrainer(resolved(made("mapl", collectors=long)))
    assert len(trainer._examples) == len(PAIRS) and not any(x.compares_prompts for x in trainer._examples)
    assert f"or the responses follow the same ones: {3 * len(PAIRS)}" in trainer.introduction
    assert trainer.step(1).metrics["grad_norm"] > 0


def said(role, content):
    return {"role": role, "content": content}


def test_prompts_of_chats_are_revised_in_the_last_message(made, monkeypatch, tmp_path):
    rows = [
        {
            "prompt": [said("user", "a"), said("assistant", "b"), said("user", f"{i}+1?{{response}}")],
            "chosen": [said("assistant", "1")],
            "rejected": [said("assistant", "2")],
        }
        for i in range(8)
    ]
    network, words = models.load("tiny(steps=0)")
    words.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    monkeypatch.setattr(models, "load", lambda model: (network, words))
    trainer = ExampleTrainer(resolved(made("t_reg", rows, output=tmp_path / "chats")))
    examples, batch = batch_of(trainer)
    better = [f"[a][b][Good: {e.messages[-1].content}]>" for e in examples]
    prompts = [words(text).input_ids for text in better]
    expected = [log_probs(network, p, x.tokens) for e, p in zip(examples, prompts, strict=True) for x in e.responses]
    check(batch, "better_log_probs", expected)


def test_a_revised_prompt_that_is_too_long_gives_no_reward(made):
    long = CollectorSettings(better_template="{question}" + "x" * 1100)
    trainer = ExampleTrainer(resolved(made("t_reg", collectors=long)))
    _, batch = batch_of(trainer)
    assert batch.input("better_log_probs").equal(batch.input("worse_log_probs"))
    assert batch.input("better_log_probs").allclose(batch.input("ref_log_probs"))


def test_weights_of_fields(made):
    def answer(code, span):
        return json.dumps({"Code": code, "Sub-code": "B1", "Span": span})

    rows = [{"prompt": f"{i}=", "chosen": answer("A", f"B1 {i}"), "rejected": answer("C", "A")} for i in range(8)]
    trainer = ExampleTrainer(resolved(made("tab_po", rows)))
    examples, batch = batch_of(trainer)
    expected = []
    for _, x in rows_of(examples):
        # Each token is a character, and the end token follows.
        offsets = [(t, t + 1) for t in range(len(x.text))] + [(len(x.text), len(x.text) + 5)]
        expected.append(torch.tensor(field_weights(x.text, offsets)))
    check(batch, "field_weights", expected)
    assert torch.cat(expected).unique().tolist() == pytest.approx([1.0, 1.1, 1.2])


def test_weights_of_fields_in_several_messages():
    """Their text is then that of the tokens."""
    _, words = models.load("tiny(steps=0)")
    collect = fixed_collectors.FixedCollectors(frozenset(), Settings(model="tiny(steps=0)"), None, words)
    ids = words('x{"Code": "ab"}').input_ids
    for text in ('{"Code": "ab"}', 'assistant: {"Code": "ab"}'):
        assert collect._of_fields(text, ids) == [1.0] * 11 + [1.1] * 2 + [1.0] * 2


def test_offsets_of_tokens_that_are_parts_of_characters():
    """A token that is a part of a character has the whole of it."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = words("a é€b").input_ids
    assert len(ids) == 8
    offsets, text = fixed_collectors._offsets(words, ids)
    assert text == "a é€b" and offsets == [(0, 1), (1, 2), (2, 3), (2, 3), *[(3, 4)] * 3, (4, 5)]


def minmax(x):
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else torch.ones_like(x)


def kinds_of(trainer, prompt, response):
    """Activations of Llama by kind, of one row, computed from its weights."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, size = trainer.model, len(prompt) + len(response)
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, given, out, name=name: seen.__setitem__(name, out))
        for name, module in model.named_modules()
    ]
    _, out = logits(model, prompt, response, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    cos, sin = seen["model.rotary_emb"]
    kinds = {"mlp": [], "attention": [], "residual": list(out.hidden_states), "logits": [out.logits]}
    for i in range(2):
        name = f"model.layers.{i}"
        kinds["mlp"].append(seen[f"{name}.mlp.act_fn"] * seen[f"{name}.mlp.up_proj"])
        q, k, v = (seen[f"{name}.self_attn.{x}_proj"] for x in "qkv")
        rotated = apply_rotary_pos_emb(*(x.view(1, size, 4, 24).transpose(1, 2) for x in (q, k)), cos, sin)
        kinds["attention"] += [q, k, v, *(x.transpose(1, 2).flatten(2) for x in rotated)]
        kinds["attention"].append(seen[f"{name}.self_attn"][0])
    return {kind: [x[0, len(prompt) - 1 : -1].mean(-1) for x in of_kind] for kind, of_kind in kinds.items()}


@pytest.mark.parametrize("kinds", [("mlp",), ("attention", "logits"), ("mlp", "attention", "residual", "logits")])
def test_masks_from_activations(made, kinds):
    trainer = ExampleTrainer(resolved(made("sparse_po", collectors=CollectorSettings(mask_activations=kinds))))
    examples, batch = batch_of(trainer)
    expected = []
    for e, x in rows_of(examples):
        found = kinds_of(trainer, e.prompt, x.tokens)
        of_kind = [torch.stack([minmax(a.double()) for a in found[kind]]).mean(0) for kind in kinds]
        expected.append(torch.stack(of_kind).mean(0))
    torch.testing.assert_close(batch.input("reward_masks").double(), torch.cat(expected), rtol=1e-3, atol=1e-3)
    assert batch.input("reward_masks").std() > 0.01


@pytest.mark.parametrize("independent", [True, False])
def test_learned_masks(made, independent):
    """Masks of the hidden states of the reference policy, their L1 norm, and the gradient to their networks."""
    settings = (f"independent={independent}", "learned=true", "l1_reward=0.02", "l1_divergence=0.03")
    s = made("sparse_po", objective=ObjectiveSettings("sparse_po", set=settings))
    trainer = ExampleTrainer(resolved(s))
    examples, batch = batch_of(trainer)
    networks, first = trainer.learner._masks, {}
    assert networks.keys() == {"reward_masks", *(["divergence_masks"] if independent else [])}
    for name, network in networks.items():
        rows = []
        for e, x in rows_of(examples):
            states = logits(trainer.model, e.prompt, x.tokens, output_hidden_states=True)[1].hidden_states[1:]
            rows.append(network([h[0, len(e.prompt) - 1 : -1] for h in states]).detach().double())
        first[name] = rows
    forward = trainer.learner._forward_pass(batch, hidden_only=True)
    for name, rows in first.items():
        torch.testing.assert_close(forward.read(name).double(), torch.cat(rows), rtol=1e-4, atol=1e-5)
    metrics = trainer.step(1).metrics
    for name, rows in first.items():
        l1 = sum(float(row.sum()) for row in rows) / len(examples)
        assert metrics[f"{name}_l1_mean"] == pytest.approx(l1, rel=1e-4)
    before = {name: network.mix.weight.clone() for name, network in networks.items()}
    trainer.step(2)
    assert all(not network.mix.weight.equal(before[name]) for name, network in networks.items())


def test_the_l1_norm_makes_masks_smaller(made):
    s = made("sparse_po", objective=ObjectiveSettings("sparse_po", set=("learned=true", "l1_reward=1")))
    trainer = ExampleTrainer(resolved(s))

    def total():
        return float(trainer.learner._forward_pass(batch_of(trainer)[1], True).reward_masks.detach().sum())

    before = total()
    trainer.step(1)
    assert 0 < total() < before


def test_masks_that_are_not_finite_are_named(made):
    trainer = ExampleTrainer(resolved(made("sparse_po learned")))
    weight = trainer.learner._masks["divergence_masks"].mix.weight
    handle = weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(RuntimeError, match=r"got loss .* and gradient norm nan in row "):
        trainer.step(1)
    handle.remove()
    with torch.no_grad():
        weight[0] = torch.inf
    with pytest.raises(RuntimeError, match=r"others in 1 parameters, the first is masks\.divergence_masks"):
        trainer.learner._check_weights(1)


def test_attention_to_the_prompt(made):
    trainer = ExampleTrainer(resolved(made("sstoken")))
    trainer.step(1)
    examples, batch = batch_of(trainer)
    trainer.model.set_attn_implementation("eager")
    expected = []
    for e, x in rows_of(examples):
        _, out = logits(trainer.model, e.prompt, x.tokens, output_attentions=True)
        expected.append(out.attentions[-1][0].mean(0)[len(e.prompt) :, : len(e.prompt)].sum(-1))
    trainer.model.set_attn_implementation("sdpa")
    check(batch, "prompt_attention", expected)
    assert batch.input("prompt_attention").std() > 1e-3


def test_what_the_policy_did_not_choose_is_prompt_to_attention(made):
    rows = [
        {"prompt": f"{i}+2=", "completion": f"{i}x3", "prompt_ids": [4, 5 + i], "completion_ids": [3 + i, 36, 6, 1]}
        | {"completion_mask": [True, False, True, True]}
        for i in range(8)
    ]
    trainer = ExampleTrainer(resolved(made("sstoken", rows)))
    examples, batch = batch_of(trainer)
    trainer.model.set_attn_implementation("eager")
    for (e, x), found in zip(rows_of(examples), batch.input("prompt_attention").view(-1, 4), strict=True):
        _, out = logits(trainer.model, e.prompt, x.tokens, output_attentions=True)
        whole = out.attentions[-1][0].mean(0)
        torch.testing.assert_close(found, whole[2:, [0, 1, 3]].sum(-1), rtol=1e-4, atol=1e-5)


def small(kind, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **settings)).eval()


def test_models_whose_layers_do_not_fit(made):
    _, batch = batch_of(ExampleTrainer(resolved(made("sstoken"))))
    windowed = small("mistral", intermediate_size=16, num_key_value_heads=2, sliding_window=4)
    with pytest.raises(ValueError, match=r"model: expected a last layer of attention without window, .* got mistral"):
        activations.attention_to_prompt(windowed, batch)
    other = small("gpt_neox", intermediate_size=16)
    with pytest.raises(
        ValueError, match=r"model: expected layers with mlp\.down_proj because of mask_activations, got GPT"
    ):
        activations.means(other, batch, ("mlp",))
    assert len(activations.means(other, batch, ("residual",))["residual"]) == 3


def test_the_history_model_of_sstoken_may_follow_the_policy(made):
    """With ema(0.5) its log-probs after a step are those of the mean of the weights before and after the step."""
    fixed, moving = (ExampleTrainer(resolved(made(x))) for x in ("sstoken", "sstoken refreshed"))
    first = {name: x.clone() for name, x in moving.model.state_dict().items()}
    for trainer in (fixed, moving):
        trainer.step(1)
    examples, batch = batch_of(moving)
    last = {name: x.clone() for name, x in moving.model.state_dict().items()}
    moving.model.load_state_dict({name: (first[name] + last[name]) / 2 for name in first})
    check(batch, "teacher_log_probs", [log_probs(moving.model, e.prompt, x.tokens) for e, x in rows_of(examples)])
    moving.model.load_state_dict(first)
    check(
        batch_of(fixed)[1], "ref_log_probs", [log_probs(moving.model, e.prompt, x.tokens) for e, x in rows_of(examples)]
    )


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("cdpo", "prompt(tokens=2)"),
        ("sparse_po", "prompt(tokens=2)"),
        ("sparse_po learned", "lora(r=2)"),
        ("sstoken", "prompt(tokens=2)"),
    ],
)
def test_with_an_adapter_the_reference_is_the_model_without_it(made, name, adapter):
    plain, adapted = (ExampleTrainer(resolved(made(name, adapter=x))) for x in (None, adapter))
    adapted.step(1)
    for input_name in adapted._fixed_names:
        both = [trainer._batch(trainer._chosen(1)).input(input_name) for trainer in (plain, adapted)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    if name == "sparse_po learned":
        both = [x.learner._forward_pass(x._batch(x._chosen(1)), True)._of_reference[1][-1] for x in (plain, adapted)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    assert adapted.step(2).metrics["grad_norm"] > 0


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_goes_on_from_its_folder(made, name, tmp_path, monkeypatch):
    """A second process has the numbers of the first, and computes nothing of what does not change."""
    s = resolved(made(name, steps=2, output=tmp_path))
    first = ExampleTrainer(s)
    first.step(1)
    first.write(tmp_path)
    checkpoint.save(first.accelerator, tmp_path, 1)
    monkeypatch.setattr(example_trainer.FixedCollectors, "__call__", None)
    second = ExampleTrainer(s)
    assert checkpoint.load(second.accelerator, tmp_path) == 1
    a, b = ({k: v for k, v in x.step(2).metrics.items() if k not in TIMES} for x in (first, second))
    assert a == b and a["grad_norm"] > 0


WRONG = {
    "no model": ("tgdpo", {"aligned": None}, "aligned: expected a model because of tgdpo, got None"),
    "one model": (
        "cdpo",
        {"collectors": CollectorSettings(positive=POSITIVE)},
        "negative: expected a model because of cdpo, got None",
    ),
    "not read": (
        "t_reg",
        {"aligned": POSITIVE},
        "aligned: expected None because t_reg has no aligned policy, got tiny",
    ),
    "learned": (
        "sparse_po learned",
        {"collectors": CollectorSettings(mask_activations=("mlp",))},
        "mask_activations: expected .* because sparse_po does not read it, got",
    ),
    "independent": (
        "sparse_po",
        {"objective": ObjectiveSettings("sparse_po", set=("independent=true",))},
        "method: expected .* whose inputs the trainer collects, got sparse_po, which requires divergence_masks",
    ),
    "tokens": (
        "tgdpo",
        {"aligned": "tiny_tools(steps=0)"},
        r"aligned: expected the tokens of tiny\(steps=0\), got tiny_tools\(steps=0\)",
    ),
    "no reverse": (
        "align_distil",
        {"collectors": CollectorSettings()},
        "reverse_teacher: expected a model because of align_distil, got None",
    ),
    "moves": (
        "align_distil",
        {"teacher": "ema(0.5)"},
        r"teacher: expected initial or a model because of align_distil, got ema\(0\.5\)",
    ),
    "other tokens": (
        "align_distil",
        {"collectors": CollectorSettings(reverse_teacher="tiny_tools(steps=0)")},
        r"reverse_teacher: expected the tokens of tiny\(steps=0\), got tiny_tools\(steps=0\)",
    ),
    "not read either": (
        "t_reg",
        {"collectors": CollectorSettings(reverse_teacher=POSITIVE)},
        "reverse_teacher: expected None because t_reg does not read it, got .tiny",
    ),
    "absent": ("tgdpo", {"aligned": "./no"}, "aligned: expected .*, got './no'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_do_not_fit(name, made):
    method, changes, message = WRONG[name]
    s = made(method, **changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        run(s)
    assert not s.output.exists()


def test_wrong_templates_and_kinds():
    with pytest.raises(ValueError, match=r"worse_template: expected a text with \{question\}, got 'x'"):
        CollectorSettings(worse_template="x")
    with pytest.raises(
        ValueError, match=r"instructions_template: expected .* and \{instructions\}, got '\{question\}'"
    ):
        CollectorSettings(instructions_template="{question}")
    with pytest.raises(ValueError, match="mask_activations: expected at least one kind, got none"):
        CollectorSettings(mask_activations=())


def test_a_method_is_compared_with_one_that_reads_no_other_model(made, tmp_path):
    folder = compare(("dpo", "tgdpo"), made("tgdpo", steps=1, output=tmp_path / "compared"), seeds=1)
    known = [json.loads((folder / f"{x}-seed0/settings.json").read_text()) for x in ("dpo", "tgdpo")]
    assert [x["aligned"] for x in known] == [None, POSITIVE]


def test_revised_prompts_are_those_of_each_response(made):
    """A response under a prompt of its own, as in MAPL, is asked for that prompt's question, better and worse."""
    trainer = ExampleTrainer(resolved(made("t_reg")))
    words, wanted = trainer.tokenizer, frozenset({"better_log_probs", "worse_log_probs"})
    first, second = (x for x in trainer._examples[0].responses)
    own = first._replace(question="9+9=", prompt=words("9+9=").input_ids)
    text = trainer._examples[0]._replace(responses=[own, second])
    words.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    asked, other = (Message("user", x) for x in ("3+3=", "7+7="))
    chat = Example("3+3=", words("[3+3=]").input_ids, [first._replace(messages=(other,)), second], (asked,))
    collect = FixedCollectors(wanted, trainer.settings, trainer.model, words)
    for example, forms in ((text, "{}"), (chat, "[{}]")):
        questions = ("9+9=" if example is text else "7+7=", example.question)
        found = collect._revised([example], batch_of_examples([example], range(1), torch.device("cpu")))
        for prompt_of, row in zip((better, worse), found, strict=True):
            expected = [prompt_of(q, x) for q, x in zip(questions, example.responses, strict=True)]
            assert [words.decode(p[p >= 0]) for p in row] == [forms.format(x) for x in expected]


def better(question, response):
    return f"Good: {question}"


def worse(question, response):
    return f"Bad {response.text}: {question}"


def test_instructions_of_chats_are_in_the_messages_of_the_response(made, monkeypatch, tmp_path):
    rows = [
        {"prompt": [said("user", f"{i}=")], "chosen": [said("assistant", "a b")], "rejected": [said("assistant", "c")]}
        for i in range(8)
    ]
    network, words = models.load("tiny(steps=0)")
    words.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    monkeypatch.setattr(models, "load", lambda model: (network, words))
    trainer = ExampleTrainer(resolved(made("mapl", rows, output=tmp_path / "chats")))
    own = [x for example in trainer._examples for x in example.responses if x.prompt is not None]
    assert len(own) == 8 * 6
    for x in own:
        assert words(f"[{x.messages[-1].content}]").input_ids == x.prompt and x.messages[-1].content != ""
