"""Scores of a teacher that are kept: which rows are computed, what is written, and that a resumed run reads it."""

import dataclasses

import pytest
import tokcredit as tc
import torch
from test_experiment import TIMES
from tokcredit.train import ObjectiveSettings, OptimizerSettings, SamplingSettings, checkpoint, models, teacher, tiny
from tokcredit.train.experiment import resolved
from tokcredit.train.scoring import left_padded
from tokcredit.train.teacher_scores import TeacherScores, fingerprint
from tokcredit.train.trainer import Trainer
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = tiny.tokenizer()
NAMES = frozenset({"teacher_log_probs", "teacher_top_ids", "teacher_top_log_probs"})
TOP = "token_loss=js(0.5, top_k=7, top_of=teacher)"
OTHER = "tiny(steps=0, seed=1)"


def batch(*rows):
    """Rows of a prompt and a response; what is in brackets is not of the policy."""
    tokens = [WORDS(text.strip("[")).input_ids for _, text in rows]
    return tc.Rollouts(
        torch.tensor([t for row in tokens for t in row]),
        torch.tensor([0, *map(len, tokens)]).cumsum(0),
        torch.arange(len(rows)),
        torch.zeros(len(rows)),
        torch.tensor([not text.startswith("[") for _, text in rows for _ in text.strip("[")]),
        extras={"prompt_tokens": left_padded([WORDS(p).input_ids for p, _ in rows], -1, torch.device("cpu"))[0]},
    )


class Counting:
    """Numbers that depend on the row alone, and how often they were computed."""

    def __init__(self):
        self.rows = []

    def __call__(self, rows):
        own = [rows.tokens[b:e].tolist() for b, e in zip(rows.begin, rows.end, strict=True)]
        self.rows += [WORDS.decode(x) for x in own]
        numbers = torch.cat([sum(x) + torch.arange(len(x)) for x in own]).float()
        top = torch.stack([numbers, numbers + 1], 1)
        return rows.with_inputs(
            teacher_log_probs=-numbers, teacher_top_ids=top.long() % 5, teacher_top_log_probs=-top / 3
        )


def check(found, given):
    expected = Counting()(given)
    for name in NAMES:
        torch.testing.assert_close(found.input(name), expected.input(name), rtol=0, atol=0)


def test_rows_are_computed_once(tmp_path):
    compute = Counting()
    scores = TeacherScores(NAMES, compute, "a", tmp_path)
    given = batch(("1+", "23"), ("1", "23"), ("1+", "23"), ("2+", "4"))
    check(scores(given), given)
    assert compute.rows == ["23", "23", "4"], "equal rows are computed once, those of another prompt apart"
    more = batch(("2+", "4"), ("1+", "[23"), ("1+", "235"), ("1+", "23"))
    check(scores(more), more)
    assert compute.rows[3:] == ["23", "235"], "another mask and another length are other rows"
    assert not list(tmp_path.iterdir()), "a run without a step has no folder"
    (tmp_path / "settings.json").write_text("{}")
    third = batch(("9", "99"), ("9", ""))
    scores(third)
    again = Counting()
    later = TeacherScores(NAMES, again, "a", tmp_path)
    assert len(list((tmp_path / "teacher").iterdir())) == 1, "what was not written yet is in the first file"
    for x in (given, more, third):
        check(later(x), x)
    assert again.rows == [] and all(path.suffix == ".parquet" for path in (tmp_path / "teacher").iterdir())
    for names, text in ((NAMES, "b"), (frozenset({"teacher_log_probs"}), "a")):
        other = Counting()
        TeacherScores(names, other, text, tmp_path)(given)
        assert len(other.rows) == 3, "another teacher, and other inputs of it"


def test_the_prompt_of_the_teacher_is_what_counts(tmp_path):
    compute = Counting()
    scores = TeacherScores(NAMES, compute, "a", tmp_path)
    given = batch(("1", "23"), ("1", "23"))
    told = left_padded([[5], [6, 7]], -1, torch.device("cpu"))[0]
    scores(given)
    scores(given.with_inputs(teacher_prompt_tokens=told))
    assert compute.rows == ["23"] * 3


def test_a_write_that_fails_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "settings.json").write_text("{}")
    scores = TeacherScores(NAMES, Counting(), "a", tmp_path)

    def full(table, new, **settings):
        new.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(OSError, match="No space left on device"):
        scores(batch(("1", "2")))
    assert not list((tmp_path / "teacher").iterdir())


def test_fingerprints():
    model = tiny.model(WORDS)
    first = fingerprint(model)
    assert first == fingerprint(tiny.model(WORDS)) != fingerprint(tiny.model(WORDS, 1))
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert fingerprint(model) != first


@pytest.fixture
def smaller(tmp_path):
    """A teacher of another size with the same tokens, whose output layer is padded to more ids."""
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 11, max_position_embeddings=512, **config))
    model.save_pretrained(tmp_path / "smaller")
    WORDS.save_pretrained(tmp_path / "smaller")
    return str(tmp_path / "smaller")


@pytest.mark.parametrize("method", ["opd", "iw_opd", "minillm", "gkd", "tip"])
def test_a_teacher_of_another_size(settings, uniform, smaller, method):
    trainer = Trainer(resolved(settings(method, teacher=smaller)))
    step = trainer.step(1)
    assert step.metrics["grad_norm"] > 0
    given = step.update.prepared.batch
    if not given.has_input("teacher_log_probs"):
        return
    model, _ = models.load(smaller)
    for row in range(2):
        prompt = [t for t in given.input("prompt_tokens")[row].tolist() if t >= 0]
        response = given.tokens[given.begin[row] : given.end[row]]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        found = given.input("teacher_log_probs")[given.begin[row] : given.end[row]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [TOP, "token_loss=forward_kl(top_k=3, top_of=teacher, outside=renormalised)"])
def test_top_tokens_that_are_kept_give_the_loss_of_logits(settings, uniform, smaller, gradients, monkeypatch, loss):
    s = settings(
        teacher=smaller,
        objective=ObjectiveSettings("gkd", set=(loss,)),
        sampling=SamplingSettings(prompts=2, group=4, max_tokens=6, temperature=0.7),
        optimizer=OptimizerSettings(lr=1e-3, micro_batch=3, precision="no"),
    )
    kept = Trainer(resolved(s))
    found = kept.step(1)
    assert found.update.prepared.batch.input("teacher_top_ids").shape[1] == (7 if loss == TOP else 3)
    monkeypatch.setattr(teacher, "scores", lambda *_: None)
    live = Trainer(resolved(s)).step(1)
    assert not live.update.prepared.batch.has_input("teacher_top_ids")
    assert found.metrics["loss"] == pytest.approx(live.metrics["loss"], rel=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert gradients[0].norm() > 1e-3


@pytest.mark.parametrize("method", ["opd", "gkd"])
def test_a_resumed_run_reads_what_is_kept(settings, uniform, method, tmp_path):
    """A step that was interrupted is repeated without the teacher."""
    objective = ObjectiveSettings(method, set=(TOP,) if method == "gkd" else ())
    s = resolved(settings(objective=objective, teacher=OTHER, output=tmp_path))

    def steps(trainer, numbers):
        return [{k: v for k, v in trainer.step(n).metrics.items() if k not in TIMES} for n in numbers]

    first = Trainer(s)
    steps(first, (1,))
    (tmp_path / "settings.json").write_text("{}")
    checkpoint.save(first.accelerator, tmp_path, 1)
    expected = steps(first, (2,))
    second = Trainer(s)
    assert checkpoint.load(second.accelerator, tmp_path) == 1
    second.learner._teacher_scores._compute = None
    assert steps(second, (2,)) == expected
    with pytest.raises(TypeError, match="not callable"):
        second.step(3)


def test_weights_that_move_are_not_kept(settings, uniform):
    for text in ("live", "ema(0.5)"):
        trainer = Trainer(resolved(settings("opd", teacher=text)))
        assert trainer.learner._teacher_scores is None and trainer.step(1).metrics["grad_norm"] >= 0


def test_more_top_tokens_than_there_are(settings, uniform):
    """The divergence is then that of the vocabulary, and nothing is kept."""
    objective = ObjectiveSettings("gkd", set=("token_loss=js(0.5, top_k=900, top_of=teacher)",))
    trainer = Trainer(resolved(settings(objective=objective, teacher=OTHER)))
    assert trainer.learner._teacher_scores is None and trainer.step(1).metrics["grad_norm"] > 0


WRONG = {
    "no teacher": ("grpo", {"teacher": None}, "teacher_engine: expected transformers because grpo has no teacher"),
    "moves": (
        "opd",
        {"teacher": "live"},
        "teacher: expected initial or a model because teacher_engine is vllm, got live",
    ),
    "whole": ("gkd", {}, "teacher_engine: expected transformers because gkd reads js, got vllm, which gives log-probs"),
    "as an input": ("tip", {}, "teacher_engine: expected transformers because tip reads reverse_kl, got vllm"),
    "as a term": ("minillm", {}, "teacher_engine: expected transformers because minillm reads reverse_kl, got vllm"),
    "warm": (
        "opd",
        {"sampling": SamplingSettings(prompts=2, temperature=0.9)},
        "temperature: expected 1, that of the teacher, because teacher_engine is vllm, got 0.9",
    ),
    "virtual": (
        "opd",
        {"adapter": "prompt(tokens=2)"},
        r"adapter: expected lora because teacher_engine is vllm, got prompt\(tokens=2\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_engines_that_do_not_fit(settings, monkeypatch, name):
    monkeypatch.setattr("tokcredit.train.compatibility.find_spec", lambda name: object())
    method, changes, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        Trainer(resolved(settings(method, **({"teacher": OTHER, "teacher_engine": "vllm"} | changes))))


def test_an_engine_that_is_not_installed(settings, monkeypatch):
    monkeypatch.setattr("tokcredit.train.compatibility.find_spec", lambda name: None)
    s = settings("opd", teacher=OTHER, teacher_engine="vllm")
    with pytest.raises(ValueError, match="teacher_engine: expected transformers because vllm is not installed"):
        Trainer(resolved(dataclasses.replace(s)))
