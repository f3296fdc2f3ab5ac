import dataclasses
import functools
import itertools
import re

import pytest
import torch
from tokcredit.train import (
    ObjectiveSettings,
    OptimizerSettings,
    ProbeSettings,
    SamplingSettings,
    ToolSettings,
    run,
    tools,
)
from tokcredit.train.clock import Clock
from tokcredit.train.conversations import Conversations
from tokcredit.train.experiment import resolved
from tokcredit.train.models import load
from tokcredit.train.record import read_metrics
from tokcredit.train.sampler import Completions
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer
from uniform import scored

pytest.importorskip("scipy")


@pytest.fixture
def talking(settings):
    sampling = SamplingSettings(prompts=4, group=4, max_tokens=16)
    return functools.partial(
        settings,
        method="match_tir",
        model="tiny_tools(steps=0)",
        tasks=("calculator(size=300)",),
        reward=None,
        sampling=sampling,
        tools=ToolSettings(turns=3),
    )


class Scripted:
    """A sampler whose rows follow a script, by the number of results so far.

    Log-probs tell turn and row, or are those of a model for these rows after these prompts.
    """

    device = torch.device("cpu")

    def __init__(self, words, script, model=None):
        self.words, self.script, self.model, self.stops = words, script, model, []

    def sync(self):
        pass

    def sample(self, prompts, count, max_tokens, temperature, stop=()):
        self.stops.append(stop)
        rows, log_probs = [], []
        for i, prompt in enumerate(prompts):
            text = self.words.decode(prompt)
            for j in range(count):
                said = self.script(text, text.count("<result>"), j)
                rows.append(self.words(said).input_ids)
                log_probs += [-float(i + 1 + j)] * len(rows[-1])
        edges, tokens = torch.tensor([0, *map(len, rows)]).cumsum(0), torch.tensor([t for r in rows for t in r])
        log_probs = torch.tensor(log_probs)
        if self.model is not None:
            log_probs = scored(self.model, [p for p in prompts for _ in range(count)], tokens, edges)
        finished = [r[-1] == self.words.eos_token_id or self.words.decode(r).endswith(tuple(stop)) for r in rows]
        return Completions(tokens, edges, log_probs, torch.tensor(finished))


def scripted(talking, script, model_scores=False, **changes):
    trainer = Trainer(resolved(talking(**changes)))
    assert isinstance(trainer.rollout_collector, Conversations)
    trainer.context.sampler = Scripted(trainer.tokenizer, script, trainer.model if model_scores else None)
    return trainer


def test_exact_rows(talking):
    def script(text, results, row):
        if "?" in text:
            return "<tool>?</tool>"
        if row == 0:
            return ["<tool>add(2,3)</tool>", "<tool>div(1,0)</tool>", "<answer>5</answer><end>"][results]
        if row == 1:
            return "1<end>"
        if row == 2:
            return "<tool>add(1,1"
        return "<tool>?</tool>"

    trainer = scripted(talking, script, sampling=SamplingSettings(prompts=2, group=4, max_tokens=16))
    collection = trainer.rollout_collector.collect(1)
    batch, words = collection.batch, trainer.tokenizer
    first = [
        ("<tool>add(2,3)</tool>", True),
        ("<result>5</result>", False),
        ("<tool>div(1,0)</tool>", True),
        ("<result>error: division by zero</result>", False),
        ("<answer>5</answer><end>", True),
    ]
    broken = [("<tool>?</tool>", True), ("<result>error: no such tool</result>", False)] * 2 + [
        ("<tool>?</tool>", True)
    ]
    expected = [first, [("1<end>", True)], [("<tool>add(1,1", True)], broken] * 2
    for i, (begin, end) in enumerate(zip(batch.begin.tolist(), batch.end.tolist(), strict=True)):
        tokens = [(t, own) for text, own in expected[i] for t in words(text).input_ids]
        assert batch.tokens[begin:end].tolist() == [t for t, _ in tokens]
        assert batch.response_mask[begin:end].tolist() == [own for _, own in tokens]
        assert collection.responses[i] == "".join(text for text, _ in expected[i]).replace("<end>", "")
    assert ((batch.rollout_log_probs == 0) == ~batch.response_mask).all()
    assert collection.finished.tolist() == [True, True, False, False] * 2, "the turn limit and the length cut"
    assert batch.group_ids.tolist() == [0] * 4 + [1] * 4
    assert set(trainer.context.sampler.stops) == {("</tool>",)}
    # The log-probs of each turn stand in its place: the first call has all rows, later ones those that go on.
    begin, end = batch.begin[0], batch.end[0]
    own = batch.rollout_log_probs[begin:end][batch.response_mask[begin:end]]
    assert own.tolist() == [-1.0] * (8 + 8 + 4) and batch.rollout_log_probs[batch.begin[3]] == -4.0


def solve(text, results, row):
    """Responses of a perfect model."""
    question = text.partition("=")[0]
    found = re.findall(r"<result>(.*?)</result>", text)
    inner, sign, last = re.fullmatch(r"\((.*)\)(.)(\d+)", question).groups()
    a, first, b = re.fullmatch(r"(\d+)(.)(\d+)", inner).groups()
    name = {"+": "add", "-": "sub", "*": "mul"}
    if results == 0:
        return f"<tool>{name[first]}({a},{b})</tool>"
    if results == 1:
        return f"<tool>{name[sign]}({found[0]},{last})</tool>"
    return f"<answer>{found[1]}</answer><end>"


def test_a_perfect_model_has_reward_one_per_turn(talking):
    trainer = scripted(talking, solve)
    collection = trainer.rollout_collector.collect(1)
    rewards = collection.batch.extras["turn_rewards"]
    assert collection.outcomes.tolist() == [1.0] * 16 and collection.finished.all()
    assert rewards.sum() == 48 and (rewards[rewards != 0] == 1).all()
    assert trainer.evaluate() == 1.0
    wrong = scripted(talking, lambda text, results, row: solve(text, results, row).replace("<answer>", "<answer>1"))
    assert wrong.evaluate() == 0.0
    assert wrong.rollout_collector.collect(1).batch.extras["turn_rewards"].sum() == 32


def naive_similarity(call, reference):
    if call.name != reference.name or call.arguments is None:
        return 0.0
    own, expected = call.arguments, reference.arguments
    shared = len(set(own) & set(expected)) / len(set(own) | set(expected))
    return (1 + shared + sum(own.get(k) == v for k, v in expected.items())) / (2 + len(expected))


def naive_turn_rewards(turns, references, answer):
    """Of each best assignment, by trying all; an answer turn by the words it shares."""
    words, pairs = [0.0] * len(turns), []
    for t, text in enumerate(turns):
        if found := re.findall(r"<answer>(.*?)</answer>", text, re.S):
            own, expected = ({*re.sub(r"\W", " ", x).split()} for x in (found[-1], answer))
            words[t] = 2 * len(own & expected) / (len(own) + len(expected)) if own & expected else 0.0
        else:
            pairs += [(t, call) for call in tools.calls(text)]
    size = max(len(pairs), len(references))
    table = [[naive_similarity(c, r) for r in references] + [0.0] * (size - len(references)) for _, c in pairs]
    assignments = list(itertools.permutations(range(size), len(pairs)))
    totals = [sum(table[i][j] for i, j in enumerate(p)) for p in assignments]
    found = []
    for chosen, total in zip(assignments, totals, strict=True):
        if total > max(totals) - 1e-9:
            out = list(words)
            for i, (t, _) in enumerate(pairs):
                out[t] += table[i][chosen[i]] / sum(u == t for u, _ in pairs)
            found.append(out)
    return found


def mixed(text, results, row):
    """Responses of four kinds: all right, a wrong call, wrong tools, and a wrong answer after right calls by name."""
    right = solve(text, results, row)
    # Later turns have a prompt each, so the kind is read from the first call.
    kind = row if results == 0 else 2 if "div(8,4)" in text else 3 if "(a=" in text else 0
    if kind == 1:
        return re.sub(r"\((\d+),", r"(1\1,", right)
    if kind == 2:
        return ["<tool>div(8,4)</tool>", "<tool>pow(2)</tool>", "<answer>2</answer><end>"][results]
    if kind == 3:
        return re.sub(r"\((\d+),(\d+)\)", r"(a=\1,b=\2)", right).replace("<answer>", "<answer>1")
    return right


@pytest.fixture
def conversations(talking):
    """Scripted conversations with the log-probs of a random model."""
    sampling = SamplingSettings(prompts=8, group=4, max_tokens=16)
    trainer = scripted(talking, mixed, model_scores=True, sampling=sampling)
    return trainer, trainer.rollout_collector.collect(1)


def runs(batch, row):
    """Tokens of a row in runs of the same mask."""
    begin, end = int(batch.begin[row]), int(batch.end[row])
    pairs = zip(batch.response_mask[begin:end].tolist(), batch.tokens[begin:end].tolist(), strict=True)
    return [(own, [t for _, t in part]) for own, part in itertools.groupby(pairs, key=lambda pair: pair[0])]


def test_turn_rewards_are_those_of_the_recorded_text(conversations):
    trainer, collection = conversations
    batch, kinds = collection.batch, []
    rewards = batch.extras["turn_rewards"]
    for row, (problem, response) in enumerate(zip(collection.problems, collection.responses, strict=True)):
        parts = [(own, trainer.tokenizer.decode(t, skip_special_tokens=True)) for own, t in runs(batch, row)]
        assert "".join(text for _, text in parts) == response and collection.outcomes[row] == problem.reward(response)
        turns = [text for own, text in parts if own]
        assert len(turns) == 3
        for (_, call), (_, result) in itertools.pairwise(parts):
            if call.endswith("</tool>"):
                assert result == tools.results(tools.calls(call))
        expected = naive_turn_rewards(turns, problem.calls, problem.answer)
        found = rewards[batch.begin[row] : batch.end[row]]
        ends = torch.tensor([len(t) for _, t in runs(batch, row)]).cumsum(0)[::2] - 1
        assert any(found[ends].tolist() == pytest.approx(e, abs=1e-5) for e in expected)
        assert found.sum() == pytest.approx(float(found[ends].sum()), abs=1e-6)
        kinds.append(found[ends].tolist())
    assert kinds[0::4] == [[1, 1, 1]] * 8 and kinds[3::4] == [[1, 1, 0]] * 8
    assert all(first < 1 for first, _, _ in kinds[1::4]) and all(k[:2] == [0, 0] for k in kinds[2::4])


def test_log_probs_of_every_turn_have_the_earlier_results_in_sight(conversations):
    trainer, collection = conversations
    batch = collection.batch
    with torch.no_grad():
        log_probs, entropies = score(trainer.model, batch)
        for row in range(0, batch.num_rows, 5):
            begin, end = int(batch.begin[row]), int(batch.end[row])
            prompt = batch.extras["prompt_tokens"][row]
            prompt = prompt[prompt >= 0]
            whole = torch.cat([prompt, batch.tokens[begin:end]])
            logits = trainer.model(whole[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            mask = batch.response_mask[begin:end]
            expected = torch.where(mask, logits.gather(1, batch.tokens[begin:end, None])[:, 0], 0.0)
            torch.testing.assert_close(log_probs[begin:end].double(), expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(batch.rollout_log_probs[begin:end].double(), expected, atol=1e-4, rtol=1e-4)
            spread = torch.where(mask, -(logits.exp() * logits).sum(-1), 0.0)
            torch.testing.assert_close(entropies[begin:end].double(), spread, atol=1e-4, rtol=1e-4)


def test_results_are_context_and_train_nothing(conversations):
    trainer, collection = conversations
    batch = collection.batch
    one = batch.select([0])
    before = score(trainer.model, one)[0]
    at = int((~one.response_mask).nonzero()[1])
    tokens = one.tokens.clone()
    tokens[at] = trainer.tokenizer("8" if int(tokens[at]) != trainer.tokenizer("8").input_ids[0] else "7").input_ids[0]
    after = score(trainer.model, dataclasses.replace(one, tokens=tokens))[0]
    assert torch.equal(before[:at], after[:at]) and not torch.allclose(before[at + 1 :], after[at + 1 :])
    prepared = trainer.objective.prepare(batch)
    assert not prepared.advantages[~batch.response_mask].any() and prepared.advantages[batch.response_mask].any()
    log_probs = torch.zeros(batch.num_tokens, requires_grad=True)
    trainer.objective.loss(prepared, log_probs).loss.backward()
    assert not log_probs.grad[~batch.response_mask].any() and log_probs.grad.any()


def test_a_resumed_run_has_the_same_numbers(talking, tmp_path, uniform):
    grpo = ObjectiveSettings("grpo")
    whole = talking(objective=grpo, reward="uniform:digest", steps=4, save_every=2, output=tmp_path / "whole")
    parts = dataclasses.replace(whole, output=tmp_path / "parts", steps=2)
    run(whole)
    run(parts)
    run(dataclasses.replace(parts, steps=4, resume=True))
    lines = [read_metrics(s.output) for s in (whole, parts)]
    names = ("reward_mean", "tokens", "loss", "grad_norm", "entropy_mean", "finished_fraction", "turn_reward_sum_mean")
    for name in names:
        assert [line.get(name) for line in lines[0]] == [line.get(name) for line in lines[1]]
    assert all(line["grad_norm"] > 0 for line in lines[0][1:])


def test_other_methods_use_tools_too(talking):
    trainer = Trainer(resolved(talking(objective=ObjectiveSettings("grpo"))))
    assert isinstance(trainer.rollout_collector, Conversations)
    with pytest.raises(ValueError, match=r"tasks: expected tasks without tools because spo_tree requires node_ids"):
        Trainer(resolved(talking(objective=ObjectiveSettings("spo_tree"))))


@pytest.mark.parametrize(("method", "prefix"), [("igpo", ""), ("trace", "ref_")])
def test_the_answer_is_scored_after_every_turn_but_the_last(talking, method, prefix):
    """By the policy for igpo and by the reference for trace, which are the same model in the first step."""
    probes = ProbeSettings(text="<answer>")
    trainer = scripted(talking, mixed, model_scores=True, objective=ObjectiveSettings(method), probes=probes)
    step = trainer.step(1)
    batch, turns = step.update.prepared.batch, step.update.prepared.batch.turns
    after, first = batch.input(f"{prefix}answer_log_probs"), batch.input(f"{prefix}initial_answer_log_probs")
    inner = turns.number < turns.counts[turns.row] - 1
    assert inner.any() and not inner.all()
    assert (~after.isnan()).nonzero()[:, 0].tolist() == turns.last[inner].tolist()
    assert (first < 0).all() and step.metrics["grad_norm"] > 0
    words, problem = trainer.tokenizer, step.collection.problems[0]
    state = [t for t in batch.input("prompt_tokens")[0].tolist() if t >= 0] + words("<answer>").input_ids
    truth = words(problem.answer).input_ids
    model, _ = load(trainer.settings.model)
    with torch.no_grad():
        logits = model(torch.tensor([state + truth])).logits[0, len(state) - 1 : -1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(truth)[:, None]).mean()
    assert first[0].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("chosen", [("addition(digits=1)",), ("calculator()", "addition(digits=1)")])
def test_tasks_without_tools_are_named(talking, chosen):
    with pytest.raises(ValueError, match=r"tasks: expected only tasks with tools, .*got \['addition'\]"):
        Trainer(resolved(talking(tasks=chosen)))


def test_at_least_one_turn(talking):
    with pytest.raises(ValueError, match="turns: expected a whole number at least 1, got 0"):
        Trainer(resolved(talking(tools=ToolSettings(turns=0))))


@pytest.mark.parametrize("method", ["match_tir", "grpo"])
def test_an_update_lowers_the_loss_of_its_conversations(talking, method):
    """A step along the gradient lowers the loss of its own rollouts, if it is small."""
    optimizer = OptimizerSettings(lr=1e-5, micro_batch=5, precision="no")
    trainer = scripted(talking, mixed, method=method, model_scores=True, optimizer=optimizer)
    batch = trainer.rollout_collector.collect(1).batch
    old = score(trainer.model, batch)[0].detach()
    prepared = trainer.objective.prepare(batch.with_inputs(old_log_probs=old))
    trainer.learner.update(trainer.learner.with_inputs(batch), 1, Clock())
    new = score(trainer.model, batch)[0].detach()
    assert trainer.objective.loss(prepared, new).loss < trainer.objective.loss(prepared, old).loss


@pytest.mark.parametrize("method", ["match_tir", "grpo", "ctpo"])
def test_a_row_for_each_call_trains_the_same(talking, method):
    """The same conversations as one row each, and as one row for each turn."""
    found = []
    for rows in ("one", "call"):
        trainer = scripted(talking, mixed, method=method, tools=ToolSettings(turns=3, episode_rows=rows))
        batch = trainer.rollout_collector.collect(1).batch
        old = score(trainer.model, batch)[0].detach()
        decided = batch.response_mask
        found.append((batch.num_rows, batch.whole.num_rows, batch.tokens[decided], old[decided]))
        prepared = trainer.objective.prepare(batch.with_inputs(old_log_probs=old))
        loss = trainer.objective.loss(prepared, old + 0.1 * torch.cos(batch.tokens.float())).loss
        found[-1] += (prepared.advantages[decided], batch.input("turn_rewards")[decided], loss)
    one, call = found
    assert one[:2] == (16, 16) and call[:2] == (48, 16)
    assert one[4].any() and one[5].any()
    for a, b in zip(one[2:], call[2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
