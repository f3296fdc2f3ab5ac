"""A teacher in the real engine: the numbers are those of transformers, and a run trains on them."""

import os
import sys
from pathlib import Path

import pytest
import tokcredit as tc
import torch

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
from tokcredit.adapters import vllm as adapter
from tokcredit.train import ObjectiveSettings, OptimizerSettings, PrivilegedSettings, SamplingSettings, Settings
from tokcredit.train.trainer import Trainer
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("engines_stay")
TOP = "token_loss=forward_kl(top_k=5, top_of=teacher)"


def larger(ids=16):
    """A teacher with twice the width of the student, and an output layer that may be padded."""
    config = tiny.model().config
    config.hidden_size, config.vocab_size = 128, ids
    torch.manual_seed(5)
    return LlamaForCausalLM(config).eval()


def test_log_probs_and_top_tokens_of_texts():
    model, rows = larger(24), [[3, 4, 5, 6, 7], [3, 9], [3, *range(4, 16), *range(4, 16)]]
    llm = adapter.engine(model, tiny.tokenizer(), dtype="float32", max_model_len=64, enforce_eager=True, max_logprobs=5)
    for top_k in (5, 0):
        found = adapter.prompt_log_probs(llm, rows, top_k)
        for row, (log_probs, ids, of_ids) in zip(rows, found, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
            own = expected.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            torch.testing.assert_close(log_probs, own, rtol=0, atol=1e-4)
            assert ids.shape == of_ids.shape == (len(row) - 1, top_k)
            torch.testing.assert_close(of_ids, expected.topk(top_k).values, rtol=0, atol=1e-4)
            torch.testing.assert_close(of_ids, expected.gather(1, ids), rtol=0, atol=1e-4)
    tokens = torch.tensor(rows[2][1:])
    prompt = {"prompt_tokens": torch.tensor([[-1, 3]])}
    batch = tc.Rollouts(tokens, torch.tensor([0, 24]), torch.zeros(1).long(), torch.zeros(1), extras=prompt)
    given = adapter.VllmTeacher(llm, 5, 16)(batch)
    ids, padding = given.input("teacher_top_ids"), found_ids(model, rows[2])
    assert padding.any() and (ids == -1).equal(padding) and ids.max() < 16


def found_ids(model, row):
    """Which of the five most likely tokens at each place are padding."""
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0, :-1].topk(5).indices >= 16


def settings_of(folder, method, engine, **changes):
    for name, model in (("student", tiny.model(tied=True)), ("teacher", larger())):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    defaults = {
        "model": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "teacher_engine": engine,
        "tasks": ("addition(digits=1)",),
        "reward": "tiny:variety",
        "steps": 2,
        "objective": ObjectiveSettings(method, set=() if method in ("opd", "iw_opd") else (TOP,)),
        "sampling": SamplingSettings(prompts=4, max_tokens=8),
        "optimizer": OptimizerSettings(lr=3e-3, precision="no"),
        "output": folder / engine,
    }
    return Settings(**(defaults | changes))


@pytest.mark.parametrize("method", ["opd", "iw_opd", "gkd", "sdft"])
def test_a_step_is_that_of_transformers(method, tmp_path):
    """Also where the teacher is told the answer; what it said is read again."""
    told = {"privileged": PrivilegedSettings("answer", "{question}{told}")} if method == "sdft" else {}
    steps = []
    for engine in ("transformers", "vllm"):
        trainer = Trainer(settings_of(tmp_path, method, engine, **told))
        torch.manual_seed(0)
        steps.append(trainer.step(1))
    (of_transformers, of_vllm), given = steps, steps[1].update.prepared.batch
    assert given.tokens.equal(of_transformers.update.prepared.batch.tokens)
    names = ["teacher_log_probs"] if method.endswith("opd") else ["teacher_top_log_probs"]
    for name in names:
        both = (step.update.prepared.batch.input(name) for step in steps)
        torch.testing.assert_close(*both, rtol=0, atol=1e-4)
    for name in ("loss", "grad_norm"):
        assert of_vllm.metrics[name] == pytest.approx(of_transformers.metrics[name], rel=1e-3, abs=1e-5)
    assert of_vllm.metrics["grad_norm"] > 1e-3
    assert trainer.learner._models[2] is None, "the engine has the only copy"
    scores = trainer.learner._teacher_scores
    scores._compute = None
    again = scores(given)
    assert all(again.input(name).equal(given.input(name)) for name in names)


def test_a_text_that_fills_the_context_is_not_told(tmp_path):
    """The engine generates a token after each text, so the longest is one shorter than its context."""
    told = PrivilegedSettings("answer", "{question}{told}")
    trainer = Trainer(settings_of(tmp_path, "sdft", "vllm", privileged=told))
    assert trainer.privileged._longest == 63
