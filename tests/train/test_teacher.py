"""Which weights a teacher has, and what its prompt says that the student's does not."""

import dataclasses

import pytest
import tokcredit as tc
import torch
from tokcredit.train import (
    ObjectiveSettings,
    PrivilegedSettings,
    SamplingSettings,
    collectors,
    comparison,
    models,
    run,
    tiny,
)
from tokcredit.train.experiment import resolved
from tokcredit.train.problems import Message, Problem
from tokcredit.train.record import read_metrics
from tokcredit.train.scoring import left_padded
from tokcredit.train.teacher import PrivilegedPrompts, Teacher
from tokcredit.train.trainer import Trainer

WORDS = tiny.tokenizer()
TEMPLATE = "{told}|{question}"
RESPONSES = ["12", "<think>no</think> 7", "8", "44", "5"]
GROUPS, REWARDS = [0, 1, 0, 0, 1], [0.0, 1.0, 0.5, 1.0, 0.2]
PROBLEMS = [Problem("t", q, a, float) for q, a in (("1+2=", "3"), ("4+4=", "8"))]


def batch():
    tokens = [WORDS(text).input_ids for text in RESPONSES]
    prompts = [WORDS(PROBLEMS[g].question).input_ids for g in GROUPS]
    return tc.Rollouts(
        torch.tensor([t for row in tokens for t in row]),
        torch.tensor([0, *map(len, tokens)]).cumsum(0),
        torch.tensor(GROUPS),
        torch.tensor(REWARDS),
        extras={"prompt_tokens": left_padded(prompts, -1, torch.device("cpu"))[0]},
    )


def told(privileged, longest=None, problems=None, responses=RESPONSES, **changes):
    settings = PrivilegedSettings(privileged, TEMPLATE, **changes)
    prompts = PrivilegedPrompts(settings, lambda problem: WORDS(problem.question).input_ids, longest)
    found = prompts(batch(), problems or [PROBLEMS[g] for g in GROUPS], responses)
    texts = [WORDS.decode([t for t in row if t >= 0]) for row in found.input("teacher_prompt_tokens").tolist()]
    return texts, found.input("teacher_mask").tolist()


def test_the_teacher_is_told_the_answer():
    texts, mask = told("answer")
    assert texts == ["3|1+2=", "8|4+4=", "3|1+2=", "3|1+2=", "8|4+4="] and mask == [True] * 5


def test_the_teacher_is_told_the_first_other_attempt_that_succeeded():
    """Row 3 is told row 2 and not itself; nothing else in the group of row 1 succeeded; thoughts are left out."""
    texts, mask = told("attempt")
    assert texts == ["8|1+2=", "4+4=", "44|1+2=", "8|1+2=", "7|4+4="]
    assert mask == [True, False, True, True, True]


def remark(prompt, response, answer):
    """Feedback on responses that do not end with 4."""
    return None if response.endswith("4") else f"{response}is not{answer}"


WITH_FEEDBACK = {"feedback": f"{__name__}:remark", "feedback_template": "{question}!{told}"}


def test_feedback_is_told_where_no_other_attempt_succeeded():
    texts, mask = told("feedback", **WITH_FEEDBACK)
    assert texts == ["8|1+2=", "4+4=!<think>no</think> 7is not8", "44|1+2=", "8|1+2=", "7|4+4="]
    assert mask == [True] * 5
    texts, mask = told("feedback", responses=["12", "7", "<think>8", "44", "5"], **WITH_FEEDBACK)
    assert texts[3] == "1+2=" and mask == [True, True, True, False, True]
    with pytest.raises(TypeError, match="feedback: expected a text or None, got int"):
        told("feedback", feedback=f"{__name__}:number")


def number(prompt, response, answer):
    return 3


def test_an_attempt_without_anything_but_thoughts_is_passed_over():
    texts, mask = told("attempt", responses=["12", "<think>7</think> ", "<think>8", "44", "5"])
    assert texts == ["44|1+2=", "4+4=", "44|1+2=", "1+2=", "4+4="]
    assert mask == [True, False, True, False, False]


def test_thoughts_that_begin_in_the_prompt_are_left_out():
    texts, _ = told("attempt", responses=["12", "no</think>\n7", "8</think> 8", "44", "5"])
    assert texts == ["8|1+2=", "4+4=", "44|1+2=", "8|1+2=", "7|4+4="]


def test_a_question_may_contain_the_names_of_the_template():
    problem = Problem("t", "{told}{question}=", "3", float)
    texts, _ = told("answer", problems=[problem] * 5)
    assert texts == ["3|{told}{question}="] * 5


def test_a_row_that_would_be_too_long_is_left_out():
    texts, mask = told("answer", longest=7)
    assert mask == [False, False, True, False, True]
    assert texts == ["1+2=", "4+4=", "3|1+2=", "1+2=", "8|4+4="]


def test_a_chat_changes_in_its_last_message():
    chat = Problem("t", "q", "3", float, messages=(Message("system", "s"), Message("user", "q")))
    seen = []
    prompts = PrivilegedPrompts(PrivilegedSettings("answer", TEMPLATE), lambda p: seen.append(p) or [1], None)
    prompts(batch(), [chat] * 5, RESPONSES)
    assert seen[0].messages == (Message("system", "s"), Message("user", "3|q"))


def test_a_row_with_nothing_to_tell_keeps_its_prompt():
    silent = [Problem("t", "1+2=", "", float)] * 5
    texts, mask = told("answer", problems=silent)
    assert texts == ["1+2=", "4+4=", "1+2=", "1+2=", "4+4="] and mask == [False] * 5


def test_the_same_prompt_and_weights_have_no_divergence():
    """Response tokens stay where they are, however long the prompt of the teacher is."""
    model = tiny.model(WORDS).double().eval()
    b = batch()
    same = b.with_inputs(teacher_prompt_tokens=b.input("prompt_tokens"))
    longer = torch.nn.functional.pad(b.input("prompt_tokens"), (3, 0), value=-1)
    for seen in (same, b.with_inputs(teacher_prompt_tokens=longer)):
        found = collectors.ForwardPass(["js"], seen, model, teacher=model, token_loss=tc.supervised.js(0.5))
        torch.testing.assert_close(found.read("js"), torch.zeros(len(b.tokens)).double(), rtol=0, atol=1e-12)


def test_the_teacher_sees_its_own_prompt():
    model = tiny.model(WORDS).double().eval()
    prompts = PrivilegedPrompts(PrivilegedSettings("answer", TEMPLATE), lambda p: WORDS(p.question).input_ids, None)
    b = prompts(batch(), [PROBLEMS[g] for g in GROUPS], RESPONSES)
    found = collectors.ForwardPass(["teacher_log_probs"], b, model, teacher=model).read("teacher_log_probs")
    for row, text in enumerate(["3|1+2=", "8|4+4=", "3|1+2=", "3|1+2=", "8|4+4="]):
        prompt, response = WORDS(text).input_ids, WORDS(RESPONSES[row]).input_ids
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(found[b.begin[row] : b.end[row]], expected, rtol=1e-9, atol=1e-9)


def test_an_average_follows_the_policy():
    policy, start = tiny.model(WORDS, 1), tiny.model(WORDS, 0)
    teacher = Teacher(tiny.model(WORDS, 0), 0.25)
    teacher.follow(policy)
    for mine, first, other in zip(teacher.model.parameters(), start.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(mine, 0.75 * first + 0.25 * other)
    again = Teacher(tiny.model(WORDS, 2), 0.25)
    again.load_state_dict(teacher.state_dict())
    torch.testing.assert_close(*(next(x.model.parameters()) for x in (again, teacher)))
    fixed = Teacher(tiny.model(WORDS, 0))
    fixed.follow(policy)
    assert torch.equal(next(fixed.model.parameters()), next(start.parameters())) and fixed.state_dict() is None


@pytest.mark.parametrize(
    ("method", "teacher"), [("sdpo", "initial"), ("sdpo", "live"), ("sdpo", "ema(0.5)"), ("minillm", "ema(0.5)")]
)
def test_self_distillation_trains_and_resumes(settings, uniform, method, teacher, tmp_path):
    objective = ObjectiveSettings(method)
    privileged = PrivilegedSettings("answer", TEMPLATE)
    whole = settings(
        objective=objective, teacher=teacher, privileged=privileged, steps=3, save_every=1, output=tmp_path / "whole"
    )
    parts = dataclasses.replace(whole, output=tmp_path / "parts", steps=1)
    run(whole)
    run(parts)
    run(dataclasses.replace(parts, steps=3, resume=True))
    lines = [
        [
            {k: v for k, v in line.items() if "seconds" not in k and k != "held_out_reward_mean"}
            for line in read_metrics(s.output)[1:]
        ]
        for s in (whole, parts)
    ]
    assert lines[0] == lines[1] and all(line["grad_norm"] > 0 for line in lines[0])


@pytest.mark.parametrize("method", ["sdpo", "sdft", "opsd"])
@pytest.mark.parametrize("privileged", ["answer", "attempt", "feedback"])
def test_methods_with_a_teacher_that_is_told_more(settings, uniform, method, privileged):
    own = WITH_FEEDBACK if privileged == "feedback" else {}
    given = PrivilegedSettings(privileged, TEMPLATE, **own)
    trainer = Trainer(resolved(settings(method, teacher="ema(0.5)", privileged=given)))
    step = trainer.step(1)
    batch = step.update.prepared.batch
    told = batch.input("teacher_mask")
    assert told.any() and step.metrics["grad_norm"] > 0
    longer = (batch.input("teacher_prompt_tokens") >= 0).sum(1) > (batch.input("prompt_tokens") >= 0).sum(1)
    assert longer.equal(told), "the prompt of every row that is told anything is longer"


@pytest.mark.parametrize("method", ["gkd", "sdpo", "tip"])
def test_the_update_from_hidden_states_is_that_of_logits(settings, uniform, gradients, monkeypatch, method):
    """The trainer keeps no logits where the output layers of both models are linear."""
    changes = {"privileged": PrivilegedSettings("answer", TEMPLATE)} if method == "sdpo" else {}
    update = []
    for apart in (True, False):
        if not apart:
            monkeypatch.setattr(collectors, "output_layer", lambda model: None)
        trainer = Trainer(resolved(settings(method, teacher="tiny(steps=0, seed=1)", **changes)))
        update.append(trainer.step(1).update)
    for name, x in update[0].metrics.items():
        assert x == pytest.approx(update[1].metrics[name], rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    assert gradients[0].norm() > 1e-3


@pytest.mark.parametrize(("longest", "trained"), [(8, 0.0), (1024, 1.0)])
def test_a_prompt_must_not_be_too_long_for_the_teacher(settings, uniform, monkeypatch, longest, trained):
    load = models.load

    def loaded(text):
        model, words = load(text)
        if "seed=1" in text:
            model.config.max_position_embeddings = longest
        return model, words

    monkeypatch.setattr(models, "load", loaded)
    trainer = Trainer(
        resolved(settings("sdpo", teacher="tiny(steps=0, seed=1)", privileged=PrivilegedSettings("answer")))
    )
    assert trainer.step(1).metrics["rows_with_gradient_fraction"] == trained


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("sdpo", {"teacher": "live"}, "privileged: expected answer or attempt because of sdpo, .* got nothing"),
        ("sdpo", {"privileged": PrivilegedSettings("answer")}, "teacher: expected a model because of sdpo, got None"),
        (
            "grpo",
            {"privileged": PrivilegedSettings("answer")},
            "privileged: expected nothing because grpo has no teacher, got answer",
        ),
        (
            "sdpo",
            {
                "teacher": "live",
                "privileged": PrivilegedSettings("attempt"),
                "sampling": SamplingSettings(prompts=2, group=1, max_tokens=6),
            },
            "group: expected at least 2 because the teacher is told another response of the group, got 1",
        ),
        (
            "sdpo",
            {"teacher": "live", "privileged": PrivilegedSettings("feedback", feedback="uniform:digest2")},
            "feedback: expected a function in uniform, got 'digest2'",
        ),
        ("grpo", {"teacher": "live"}, "teacher: expected None because grpo has no teacher, got live"),
        (
            "opd",
            {"teacher": "ema(2)"},
            r"teacher: expected ema\(rate\) with a rate above 0 and at most 1, got ema\(2\)",
        ),
        ("opd", {"teacher": "tiny_tools(steps=0)"}, "teacher: expected the tokens of tiny"),
    ],
)
def test_settings_that_do_not_fit(settings, method, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(resolved(settings(method, **changes)))


def test_feedback_is_given_where_it_is_told():
    with pytest.raises(ValueError, match="feedback: expected a function because privileged is feedback, got None"):
        PrivilegedSettings("feedback")
    with pytest.raises(ValueError, match="feedback: expected None because privileged is answer, got a:b"):
        PrivilegedSettings("answer", feedback="a:b")
    with pytest.raises(ValueError, match=r"feedback_template: expected a text with \{told\}, got '\{question\}'"):
        PrivilegedSettings("feedback", feedback="a:b", feedback_template="{question}")


def test_a_template_must_say_both():
    with pytest.raises(ValueError, match=r"privileged_template: expected a text with \{told\}, got 'x \{question\}'"):
        PrivilegedSettings("answer", "x {question}")


def test_a_comparison_gives_the_teacher_to_the_methods_that_read_one(settings, tmp_path):
    given = settings("grpo", teacher="initial")
    runs = {method: comparison._one(given, method, 0, tmp_path) for method in ("grpo", "gkd")}
    assert [run.teacher for run in runs.values()] == [None, "initial"]
