import dataclasses
import io
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from meeting import in_both
from test_experiment import numbers
from tokcredit.methods.r3 import dominance
from tokcredit.train import ObjectiveSettings, ReplaySettings, SamplingSettings, Settings, run, tasks, tiny
from tokcredit.train.experiment import resolved
from tokcredit.train.replay import Buffer, Replay, StoredResponse, _key
from tokcredit.train.rollout_collection import SamplingContext
from tokcredit.train.sampler import Completions
from tokcredit.train.trainer import Trainer

WORDS = tiny.tokenizer()
ALONE = SimpleNamespace(index=0, count=1, exchange=list, together=lambda function: function())


class Scripted:
    """Gives fixed responses; one of four tokens is cut. The log-probs tell steps and positions."""

    def __init__(self):
        self.responses, self.step, self.prompts = {}, 0, []

    def sync(self):
        self.step += 1

    def sample(self, prompts, count, max_tokens, temperature, stop):
        self.prompts = [WORDS.decode(p) for p in prompts]
        rows = [WORDS(r).input_ids for text in self.prompts for r in self.responses.get(text, ["no"] * count)]
        lengths = torch.tensor([len(r) for r in rows])
        return Completions(
            torch.tensor([t for r in rows for t in r]),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            torch.cat([-torch.arange(len(r)) / 10 - self.step for r in rows]),
            lengths < 4,
        )


def collector(ranks=ALONE, prompts=2, seed=0, **changes):
    problems = [tasks.Problem("t", q, "y", lambda response: float("y" in response)) for q in ("a?", "b?")]
    settings = Settings(
        sampling=SamplingSettings(prompts=prompts, group=3, max_tokens=4), replay=ReplaySettings(**changes), seed=seed
    )
    return Replay(SamplingContext(settings, tasks.Problems([problems], problems), WORDS, Scripted(), ranks))


def collect(c, number, a, b):
    c._context.sampler.responses = {"a?": a, "b?": b}
    return c.collect(number)


def rows(collection):
    """Question, response, replayed, truncated, reward, log-probs of each row."""
    batch = collection.batch
    return [
        (p.question, response, *marks, log_probs.tolist())
        for p, response, *marks, log_probs in zip(
            collection.problems,
            collection.responses,
            batch.extras["replayed"].tolist(),
            batch.extras["truncated"].tolist(),
            batch.rewards.tolist(),
            batch.rollout_log_probs.split(batch.lengths.tolist()),
            strict=True,
        )
    ]


def test_opposite_outcomes_join():
    c = collector(reflection="Reflect!")
    first = collect(c, 1, ["yes1", "n1", "n2"], ["n3", "n4", "nn5!"])
    assert len(rows(first)) == 6 and not first.batch.extras["replayed"].any(), "nothing was stored before"
    second = collect(c, 2, ["n6", "n7", "n8"], ["y2", "y3", "y4"])
    batch, fresh, stored = second.batch, rows(second)[:9], rows(second)[9:]
    assert not any(row[2] for row in fresh) and all(row[2] for row in stored)
    (reflected,) = {question for question, *_ in fresh} - {"a?", "b?"}
    assert reflected in {f"b?\n\n{n}\n\nReflect!" for n in ("n3", "n4", "nn5!")}, "of a? a third was right"
    assert ("a?", "yes1", True, True, 1.0, pytest.approx([-1.0, -1.1, -1.2, -1.3])) in stored
    wrong = [row for row in stored if row[0] == "b?"]
    assert len(wrong) == 2 and len(stored) == 3 and len({row[1] for row in wrong}) == 2
    for _, response, _, truncated, reward, log_probs in wrong:
        assert response in ("n3", "n4", "nn5!") and reward == 0 and truncated == (response == "nn5!")
        assert log_probs == pytest.approx([-1 - i / 10 for i in range(len(response))])
    # A stored row is a row of its group: same number, same prompt, and every token is the policy's.
    of_question = {}
    for p, group, prompt in zip(second.problems, batch.group_ids.tolist(), batch.extras["prompt_tokens"], strict=True):
        assert of_question.setdefault(p.question, group) == group
        assert WORDS.decode(prompt[prompt >= 0]) == p.question
    assert len(set(of_question.values())) == 3 and bool(batch.response_mask.all())
    assert [WORDS.decode(t) for t in batch.tokens.split(batch.lengths.tolist())] == second.responses
    assert sorted(second.outcomes.tolist()) == [0, 0, 0, 1, 1, 1] and second.finished.all(), "plain, fresh rows only"
    third = collect(c, 3, ["y", "n", "n"], ["y", "y", "n"])
    assert not third.batch.extras["replayed"].any(), "mixed groups stay as they are"
    assert {p.question[:2] for p in third.problems[6:]} == {"a?"}, "of a? a sixth was right, of b? a half"
    assert set(c.state_dict()["totals"]) == {"t: a?", "t: b?"}, "reflections are not stored"


def test_numbers_of_settings():
    c = collector(remembered=3, replayed=3, hard=0.0)
    collect(c, 1, ["n1", "n2", "n3"], ["y1", "n4", "n5"])
    got = rows(collect(c, 2, ["y1", "y2", "y3"], ["n6", "n7", "n8"]))
    assert sorted(row[1] for row in got[6:]) == ["n1", "n2", "n3", "y1"] and len(c._context.sampler.prompts) == 2
    with pytest.raises(ValueError, match="replayed: expected at most the 1 responses remembered, got 2"):
        collector(remembered=1)


def test_buffer_forgets_the_oldest_of_a_kind():
    buffer, draw = Buffer(2), np.random.default_rng(0)
    for i, reward in enumerate([1.0, 0.0, 0.0, 0.0, 0.5, 0.0]):
        buffer.add("p", StoredResponse(torch.tensor([i]), torch.zeros(1), reward, False))
    assert sorted(int(r.tokens) for r in buffer.draw("p", False, 9, draw)) == [4, 5]
    assert [int(r.tokens) for r in buffer.draw("p", True, 9, draw)] == [0]
    assert buffer.mean_reward("p") == 0.25, "of all six"
    assert buffer.mean_reward("q") is None and buffer.draw("q", True, 1, draw) == []
    assert len({int(buffer.draw("p", False, 1, draw)[0].tokens) for _ in range(20)}) == 2


def test_state_survives_a_file():
    c = collector(replayed=1)
    states = [c.state_dict()]
    collect(c, 1, ["yes1", "y2", "n1"], ["n2", "n3", "n4"])
    states.append(c.state_dict())
    for state in states:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other = collector(replayed=1)
        other.load_state_dict(torch.load(file))
        other._context.sampler.step = c._context.sampler.step
    for number in (2, 3, 4):
        script = (["n", "n", "n"], ["y", "y", "y"])
        got = [rows(collect(x, number, *script)) for x in (c, other)]
        assert got[0] == got[1] and sum(row[2] for row in got[0]) == 2


def test_processes_share_what_they_store(monkeypatch):
    script = [(["y1", "n1", "n2"], ["n3", "n4", "n5"]), (["n6"] * 3, ["y2"] * 3), (["y"] * 3, ["n"] * 3)]

    def collected(ranks):
        c = collector(ranks)
        made = (collect(c, number, *responses) for number, responses in enumerate(script, start=1))
        return [(x, dict(c.state_dict()["totals"])) for x in made]

    steps = zip(collected(ALONE), *in_both(monkeypatch, collected), strict=True)
    for (whole, totals), *both in steps:
        got = [x for x, _ in both]
        assert sorted(rows(got[0]) + rows(got[1])) == sorted(rows(whole))
        groups = [set(x.batch.group_ids.tolist()) for x in got]
        assert not groups[0] & groups[1] and groups[0] | groups[1] == set(whole.batch.group_ids.tolist())
        assert both[0][1] == both[1][1] == totals


def never(prompt, response, answer):
    return 0.0


def has_digit(prompt, response, answer):
    return float(any(c.isdigit() for c in response[:4]))


def test_the_gradient_is_the_formulas(settings, uniform, gradients):
    objective = ObjectiveSettings("r3", set=("alpha=2.0", "max_length=6"))
    trainer = Trainer(
        resolved(settings("r3", objective=objective, reward="test_replay:never", replay=ReplaySettings(hard=0.6)))
    )
    generator = torch.Generator().manual_seed(0)
    for problem in trainer.context.chosen(1)[1]:
        for length, reward in ((3, 1.0), (5, 1.0), (6, 0.0), (4, 0.0)):
            tokens = torch.randint(3, 90, (length,), generator=generator)
            # About those of a random model over 100 tokens, so that some ratios are clipped and some are not.
            log_probs = -4.6 + 0.3 * torch.randn(length, generator=generator)
            trainer.rollout_collector._buffer.add(_key(problem), StoredResponse(tokens, log_probs, reward, length == 6))
    parameters = list(trainer.model.parameters())
    before = [p.detach().clone() for p in parameters]
    batch = trainer.step(1).collection.batch
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
            p.grad = None
    replayed = batch.extras["replayed"]
    assert batch.num_groups == 4 and batch.num_rows == 20 and replayed.tolist() == [False] * 16 + [True] * 4
    current, entropies, stored = [], [], batch.rollout_log_probs.split(batch.lengths.tolist())
    prompts = [row[row >= 0] for row in batch.extras["prompt_tokens"]]
    for prompt, tokens in zip(prompts, batch.tokens.split(batch.lengths.tolist()), strict=True):
        p = trainer.model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        current.append(p.gather(1, tokens[:, None])[:, 0])
        entropies.append(-(p.exp() * p).sum(1).detach())
    shape = dominance()(batch.with_inputs(entropies=torch.cat(entropies)))
    rewards = torch.where(replayed, batch.rewards + 1 - batch.lengths / 6, shape)
    loss, clipped = torch.zeros(()), []
    for group in range(4):
        members = (batch.group_index == group).nonzero()[:, 0].tolist()
        r = rewards[members]
        alpha = 2.0 if replayed[members].any() else 1.0
        for i, a in zip(members, ((r - r.mean()) / (alpha * r.std() + 1e-6)).tolist(), strict=True):
            ratio = (current[i] - (stored[i] if replayed[i] else current[i].detach())).exp()
            clipped += [*((ratio < 0.8) | (ratio > 1.2)).tolist()] if replayed[i] else []
            loss = loss + torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean() / 20
    loss.backward()
    assert any(clipped) and not all(clipped)
    assert all(p.grad.abs().max() > 0 for p in parameters)
    (found,), expected = gradients, torch.cat([p.grad.reshape(-1) for p in parameters])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_stopped_run_continues_with_the_same_numbers(settings, uniform, tmp_path, monkeypatch):
    whole, stopped = (
        settings(
            "r3",
            reward="test_replay:has_digit",
            tasks=("addition(digits=1, size=4)",),
            held_out=0.4,
            steps=5,
            save_every=100,
            eval_every=5,
            rollouts_every=5,
            replay=ReplaySettings(hard=0.5),
            output=tmp_path / name,
        )
        for name in ("whole", "stopped")
    )
    step, made = Trainer.step, []

    def counted(trainer, number):
        if trainer.settings.output == stopped.output and number == 3 and not trainer.settings.resume:
            os.kill(os.getpid(), signal.SIGINT)
        done = step(trainer, number)
        made.append((number, int(done.collection.batch.extras["replayed"].sum()), done.collection.batch.num_groups))
        return done

    monkeypatch.setattr(Trainer, "step", counted)
    run(whole)
    assert sum(n for number, n, _ in made if number > 3) > 0, "rows stored before the stop are replayed after it"
    assert any(groups > 2 for _, _, groups in made), "hard prompts are asked again"
    assert run(stopped) is None
    run(dataclasses.replace(stopped, resume=True))
    assert made[:5] == made[5:] and numbers(stopped.output) == numbers(whole.output)
