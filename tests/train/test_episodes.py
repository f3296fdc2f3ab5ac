import dataclasses
import functools
import math

import pyarrow.parquet as pq
import pytest
import tokcredit as tc
import torch
from tokcredit.report import readers, report
from tokcredit.rewards.bounded import BoundedCalls
from tokcredit.train import ObjectiveSettings, OptimizerSettings, SamplingSettings, Settings, ToolSettings, run, worlds
from tokcredit.train.dialogues import Dialogue, Layout
from tokcredit.train.episodes import Episodes, anchor
from tokcredit.train.experiment import resolved
from tokcredit.train.judging import RewardError
from tokcredit.train.problems import Problem
from tokcredit.train.ranks import Ranks
from tokcredit.train.sampler import Completions
from tokcredit.train.scoring import score
from tokcredit.train.trainer import Trainer
from uniform import scored

TASK = "environment('corridor:Corridor', cells=4, size=6)"


@pytest.fixture
def acting(settings):
    sampling = SamplingSettings(prompts=2, group=4, max_tokens=8)
    return functools.partial(
        settings,
        model="tiny(steps=0)",
        tasks=(TASK,),
        reward=None,
        sampling=sampling,
        tools=ToolSettings(turns=5),
        held_out=0.4,
    )


class Scripted:
    """A sampler whose rows follow scripts, the i-th row of a group the i-th, with the log-probs of the model."""

    device = torch.device("cpu")

    def __init__(self, trainer, script):
        self.model, self.words, self.script = trainer.model, trainer.tokenizer, script
        self.stops = set()

    def sync(self):
        pass

    def sample(self, prompts, count, max_tokens, temperature, stop=()):
        self.stops.add(stop)
        repeated = [prompt for prompt in prompts for _ in range(count)]
        # The first action tells the rows of a group apart.
        places = [(i % count, 0) for i in range(len(repeated))] if count > 1 else map(self.place, prompts)
        rows = [self.words(self.script[kind][turn]).input_ids for kind, turn in places]
        assert max(map(len, rows)) <= max_tokens
        edges = torch.tensor([0, *map(len, rows)]).cumsum(0)
        tokens = torch.tensor([t for row in rows for t in row])
        log_probs = scored(self.model, repeated, tokens, edges)
        return Completions(tokens, edges, log_probs, torch.ones(len(rows), dtype=torch.bool))

    def place(self, prompt):
        """The number of the script that begins with the first action in the prompt, and the number of its actions."""
        actions = self.words.decode(prompt).split("\n")[1:-1:2]
        if not actions:
            return 0, 0
        (found,) = (k for k, script in enumerate(self.script) if script[0] == f"{actions[0]}\n")
        return found, len(actions)


SCRIPT = [
    ["right\n", "right\n", "right\n"],
    ["left\n", "right\n", "right\n", "right\n"],
    ["stay\n", "stay\n", "right\n", "left\n", "left\n"],
    ["right \n", "left\n", "right\n", "right\n", "right\n"],
]


def made(acting, script=SCRIPT, **changes):
    """A trainer whose episodes follow scripts."""
    trainer = Trainer(resolved(acting(**changes)))
    assert isinstance(trainer.rollout_collector, Episodes)
    trainer.context.sampler = Scripted(trainer, script)
    return trainer


def naive(begun, script):
    """The text, the rewards, the states and the scores of an episode in a corridor of four cells."""
    at, out = begun, []
    for action in script[:5]:
        before, reward, said = at, 0.0, "no"
        if action.strip() == "left" and at > 0:
            at, reward, said = at - 1, -0.125, "left"
        elif action.strip() == "right":
            at, reward, said = at + 1, 1.0 if at == 2 else 0.25, "right"
        out.append((action, reward, before, at / 3, f"{said} {at}"))
        if at == 3:
            break
    return out


@pytest.mark.parametrize("rows", ["one", "call"])
def test_exact_rows(acting, rows):
    trainer = made(acting, tools=ToolSettings(turns=5, episode_rows=rows))
    collection, words = trainer.rollout_collector.collect(1), trainer.tokenizer
    batch, row, totals = collection.batch, 0, []
    begun = {p.world.seed: p.world.seed % 2 for p in collection.problems}
    assert trainer.context.sampler.stops == {("\n",)} and len(begun) == 2
    for number, seed in enumerate(begun):
        for kind, script in enumerate(SCRIPT):
            steps = naive(begun[seed], script)
            over = steps[-1][3] == 1
            totals.append(sum(step[1] for step in steps))
            outcome = steps[-1][1] if over else 0.0
            prompt, tokens, mask, turns = f"begin {begun[seed]}\n", [], [], []
            for k, (action, _, _, _, answer) in enumerate(steps):
                if rows == "call":
                    prompt += "" if k == 0 else f"{steps[k - 1][0]}{steps[k - 1][4]}\n"
                    tokens, mask, turns = [], [], []
                said = words(action).input_ids
                tokens, mask, turns = tokens + said, mask + [True] * len(said), [*turns, len(tokens) + len(said)]
                last = k + 1 == len(steps)
                if rows == "one" and not last:
                    heard = words(f"{answer}\n").input_ids
                    tokens, mask = tokens + heard, mask + [False] * len(heard)
                    continue
                if rows == "call" or last:
                    own = [k] if rows == "call" else range(len(steps))
                    begin, end = int(batch.begin[row]), int(batch.end[row])
                    assert batch.tokens[begin:end].tolist() == tokens
                    assert batch.response_mask[begin:end].tolist() == mask
                    asked = batch.input("prompt_tokens")[row]
                    assert words.decode(asked[asked >= 0]) == prompt
                    assert batch.group_ids[row] == number and batch.rewards[row] == outcome
                    assert batch.trajectory_ids[row] == number * 4 + kind
                    assert bool(batch.input("truncated")[row]) == (last and not over)
                    at = begin + torch.tensor(turns) - 1
                    rewards = [steps[i][1] for i in own]
                    assert batch.input("turn_rewards")[at].tolist() == rewards
                    dense = [r if not over or i + 1 < len(steps) else 0.0 for i, r in zip(own, rewards, strict=True)]
                    assert batch.token_rewards[at].tolist() == dense
                    assert batch.token_rewards[begin:end].abs().sum() == sum(map(abs, dense))
                    assert batch.input("turn_scores")[at].tolist() == pytest.approx([steps[i][3] for i in own])
                    assert batch.input("turn_scores")[begin:end].isnan().sum() == end - begin - len(own)
                    assert batch.input("turn_ids")[at].tolist() == list(own)
                    states = [f"{seed}: {steps[i][2]}" for i in own]
                    assert batch.input("anchor_ids")[at].tolist() == [anchor(state) for state in states]
                    assert collection.columns["states"][row] == states
                    assert collection.columns["answers"][row] == [steps[i][4] for i in own]
                    row += 1
    assert row == batch.num_rows
    assert collection.outcomes.tolist() == totals


@functools.cache
def collected():
    """A model, and the same episodes in both layouts."""
    found = {}
    for rows in ("one", "call"):
        tools = ToolSettings(turns=5, episode_rows=rows)
        sampling = SamplingSettings(prompts=2, group=4, max_tokens=8)
        s = Settings(model="tiny(steps=0)", tasks=(TASK,), sampling=sampling, tools=tools, held_out=0.4)
        trainer = made(lambda s=s: dataclasses.replace(s, objective=ObjectiveSettings("grpo")))
        found[rows] = trainer.rollout_collector.collect(1).batch
    return trainer.model, found


@pytest.fixture
def layouts(cache):
    return collected()


COMPARED = (
    *("grpo", "gigpo", "kevin", "mt_grpo", "turn_progress", "process", "match_tir", "ppo", "reinforce_pp", "gspo"),
    *("ctpo", "dr_grpo", "rloo", "opo", "ba", "dapo", "tempo"),
)


@pytest.mark.parametrize("method", COMPARED)
def test_both_layouts_train_the_same(layouts, method):
    model, batches = layouts
    found = {}
    for rows, batch in batches.items():
        decided = batch.response_mask.nonzero()[:, 0]
        numbers = torch.arange(len(decided), dtype=torch.float32)
        log_probs, entropies = score(model, batch)
        place = torch.zeros(batch.num_tokens)
        place[decided] = numbers
        # What a critic and an older policy would give, the same for each token in both layouts.
        batch = batch.with_inputs(
            values=0.3 * torch.sin(place),
            bootstrap_values=torch.where(batch.input("truncated"), 0.25, 0.0),
            old_log_probs=log_probs.detach() + 0.3 * torch.cos(place) * batch.response_mask,
            ref_log_probs=log_probs.detach() - 0.1,
            entropies=entropies.detach(),
        )
        objective = tc.methods.load(method)
        prepared = objective.prepare(batch)
        loss = objective.loss(prepared, log_probs).loss
        model.zero_grad()
        loss.backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        found[rows] = prepared.advantages[decided], loss.detach(), gradient
    assert found["one"][0].abs().max() > 0 and found["one"][2].abs().max() > 0
    for one, call in zip(*found.values(), strict=True):
        torch.testing.assert_close(call, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("objective", [ObjectiveSettings("gigpo"), ObjectiveSettings("gspo", clip="ppo(0.2, 0.2)")])
def test_steps_of_the_trainer_are_the_same(acting, gradients, objective):
    """With several optimizer steps, whose parts are whole episodes in both layouts."""
    optimizer = OptimizerSettings(lr=1e-4, micro_batch=3, precision="no", epochs=2, minibatches=2)
    losses = []
    for rows in ("one", "call"):
        tools = ToolSettings(turns=5, episode_rows=rows)
        trainer = made(acting, objective=objective, optimizer=optimizer, tools=tools)
        metrics = trainer.step(1).metrics
        losses.append([metrics[name] for name in ("loss", "reward_mean", "length_mean", "turn_reward_sum_mean")])
    one, call = gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :]
    assert len(one) == len(call) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
    for a, b in zip(one, call, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def test_gigpo_compares_turns_from_the_same_state(acting):
    trainer = made(acting, objective=ObjectiveSettings("gigpo"))
    collection = trainer.rollout_collector.collect(1)
    batch = collection.batch
    prepared = trainer.objective.prepare(batch)
    begun = {p.world.seed: p.world.seed % 2 for p in collection.problems}
    expected = []
    for b in begun.values():
        episodes = [naive(b, script) for script in SCRIPT]
        totals = torch.tensor([sum(step[1] for step in steps) for steps in episodes], dtype=torch.float64)
        to_go = [
            [sum(0.95 ** (i - k) * steps[i][1] for i in range(k, len(steps))) for k in range(len(steps))]
            for steps in episodes
        ]
        states = {}
        for steps, returns in zip(episodes, to_go, strict=True):
            for step, value in zip(steps, returns, strict=True):
                states.setdefault(step[2], []).append(value)
        for j, steps in enumerate(episodes):
            of_episode = float((totals[j] - totals.mean()) / (totals.std() + 1e-6))
            for step, value in zip(steps, to_go[j], strict=True):
                own = torch.tensor(states[step[2]], dtype=torch.float64)
                of_state = float((value - own.mean()) / (own.std() + 1e-6)) if len(own) > 1 else 0.0
                expected.append(of_episode + of_state)
    ends = (~batch.input("turn_scores").isnan()).nonzero()[:, 0]
    assert prepared.advantages[ends].tolist() == pytest.approx(expected, abs=1e-4)


def test_held_out_worlds_are_measured_by_their_total_reward(acting):
    trainer = made(acting, SCRIPT[1:2])
    seeds = [p.world.seed for p in trainer.problems.held_out]
    totals = [sum(step[1] for step in naive(seed % 2, SCRIPT[1])) for seed in seeds]
    assert trainer.rollout_collector.attempt(trainer.problems.held_out) == totals
    assert trainer.evaluate() == pytest.approx(sum(totals) / len(totals))


TROUBLE = [["right\n", "right\n", "right\n"], ["stay\n", "trouble\n"], SCRIPT[1], ["right \n", "left\n", *["no\n"] * 3]]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("raise", "KeyError: 'x'"),
        ("text", "TypeError: observation: expected Observation, got str"),
        ("nan", "ValueError: reward, score: expected finite numbers, got nan"),
        ("exit", "the process ended"),
        ("hang", "no result within 0.3 s of processor time"),
    ],
)
def test_a_failing_environment_is_named(acting, monkeypatch, trouble, reason):
    calls = BoundedCalls(worlds._PLAYING, "play", 0.3)
    monkeypatch.setattr(worlds, "_calls", lambda: calls)
    task = f"environment('corridor:Corridor', cells=4, size=6, trouble={trouble!r})"
    trainer = made(acting, TROUBLE, tasks=(task,))
    with pytest.raises(RewardError) as caught:
        trainer.rollout_collector.collect(1)
    calls.close()
    message = str(caught.value)
    assert message.startswith(f"environment: environment('corridor:Corridor', cells=4, trouble={trouble!r}), seed ")
    assert f": episode 2, step 2, action 'trouble\\n': {reason}" in message


@pytest.mark.parametrize("rows", ["one", "call"])
@pytest.mark.parametrize("policy", ["zero", "drop"])
def test_what_happens_to_a_failed_episode(acting, policy, rows):
    tools = ToolSettings(turns=5, episode_rows=rows)
    trainer = made(acting, TROUBLE, on_reward_error=policy, tools=tools)
    whole = trainer.rollout_collector.collect(1)
    collection = whole.judged(trainer.ranks)
    assert trainer.context.rewards.failures() == 2
    lost = whole.batch.trajectory_ids % 4 == 1
    assert not whole.batch.input("turn_rewards")[lost.repeat_interleave(whole.batch.end - whole.batch.begin)].any()
    assert (whole.batch.rewards[lost] == 0).all() and not whole.finished[1::4].any()
    if policy == "zero":
        assert collection is whole and whole.outcomes[1::4].tolist() == [0.0, 0.0]
    else:
        assert len(collection.outcomes) == 6 and not (collection.batch.trajectory_ids % 4 == 1).any()
        assert len(collection.columns["states"]) == collection.batch.num_rows == int((~lost).sum())


@pytest.mark.parametrize("rows", ["one", "call"])
def test_recorded_episodes_are_read_by_the_report(acting, monkeypatch, rows):
    def sampler(model, words, *others):
        trainer = type("of", (), {"model": model, "tokenizer": words})
        return Scripted(trainer, SCRIPT)

    monkeypatch.setattr("tokcredit.train.trainer.TransformersSampler", sampler)
    tools = ToolSettings(turns=5, episode_rows=rows)
    s = acting(
        "gigpo", steps=1, tools=tools, eval_problems=1, sampling=SamplingSettings(prompts=2, group=4, max_tokens=8)
    )
    run(s)
    table = pq.read_table(s.output / "rollouts-000001.parquet").to_pylist()
    assert {row["task"] for row in table} == {"environment"}
    for row in table:
        assert row["world"].startswith("environment('corridor:Corridor', cells=4), seed ")
        assert len(row["answers"]) == len(row["states"]) == sum(not math.isnan(x) for x in row["turn_scores"])
    read = readers.read(s.output)
    batch = read.batch
    for name in ("turn_ids", "anchor_ids", "token_rewards", "turn_rewards", "turn_scores"):
        assert batch.has_input(name)
    assert batch.whole.num_rows == 8 and (batch.trajectories is None) == (rows == "one")
    again = tc.methods.gigpo().prepare(batch).advantages
    torch.testing.assert_close(again, read.advantages, atol=1e-5, rtol=1e-5)
    assert batch.has_input("context_keys") == (rows == "call")
    for method in ("kevin", "tempo"):
        report(s.output, tc.methods.load(method))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "uniform:digest"}, "reward: expected None because episodes of .* have rewards, got uniform:digest"),
        ({"method": "spo_tree"}, "tasks: expected tasks without an environment because spo_tree requires node_ids"),
        ({"method": "lenvm"}, "tasks: expected tasks without an environment because lenvm requires length_values"),
        (
            {"method": "igpo"},
            "tasks: expected tasks without an environment because igpo requires answer_log_probs, initial_answer_log_p",
        ),
        (
            {"method": "trace"},
            "tasks: expected tasks without an environment because trace requires ref_answer_log_probs, ref_initial_an",
        ),
        (
            {"method": "gigpo", "tasks": ("calculator()",), "model": "tiny_tools(steps=0)"},
            r"tasks: expected tasks with an environment, such as minigrid\(\), because gigpo requires anchor_ids",
        ),
        (
            {"method": "dpo", "sampling": SamplingSettings(prompts=2, group=2, max_tokens=8)},
            "tasks: expected tasks whose responses are one row because dpo compares pairs of rows, got environment",
        ),
        ({"tasks": (TASK, "addition()")}, r"tasks: expected only tasks with an environment, .*got \['addition'\]"),
        ({"tasks": ("environment('corridor')",)}, "path: expected package.module:Class, got 'corridor'"),
        (
            {"tasks": ("environment('corridor:Corridor', rooms=1)",)},
            r"tasks: environment\('corridor:Corridor', rooms=1\): expected an environment that begins with seed \d+, "
            "got TypeError: .*rooms",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(acting, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(resolved(acting(**changes)))


def test_the_rows_of_all_processes_are_gathered_with_their_turns(layouts, monkeypatch):
    _, batches = layouts
    batch = batches["call"]
    whole, first, second = (
        batch.select(rows) for rows in (slice_of(batch, 0, 8), slice_of(batch, 0, 4), slice_of(batch, 4, 8))
    )
    sent = []
    monkeypatch.setattr("tokcredit.train.ranks.gather_object", lambda found: sent.append(found[0]) or sent[-2:])

    def rank(index):
        accelerator = type("of", (), {"process_index": index, "num_processes": 2, "device": torch.device("cpu")})
        return Ranks(accelerator)

    sent.clear()
    names = frozenset({"anchor_ids"})
    rank(0).gather(first, names)
    together, mine = rank(1).gather(second, names)
    expected = tc.methods.gigpo().prepare(whole).advantages
    torch.testing.assert_close(tc.methods.gigpo().prepare(together).advantages, expected)
    assert torch.equal(together.input("context_keys"), whole.input("context_keys"))
    assert mine.tolist() == list(range(first.num_rows, whole.num_rows))
    # Outcomes that equal the sums of the rewards of steps are not taken for the same rewards given twice.
    rows = torch.arange(2)
    sent.clear()
    equal = tc.Rollouts(rows, torch.arange(3), rows, torch.ones(2)).with_inputs(token_rewards=torch.ones(2))
    rank(0).gather(equal, frozenset())
    assert rank(1).gather(equal, frozenset())[0].whole.rewards.tolist() == [2.0] * 4


@pytest.mark.parametrize("turns", [(3, 1), (1, 3)])
def test_processes_whose_dialogues_have_one_turn_each(turns, monkeypatch):
    sent = []
    monkeypatch.setattr("tokcredit.train.ranks.gather_object", lambda found: sent.append(found[0]) or sent)
    for index, count in enumerate(turns):
        made = [Dialogue(Problem("t", "q", "", float), [7]) for _ in range(2)]
        for d in made:
            for k in range(count):
                d.say([k], [-1.0], "", True)
                d.hear([9] * (k + 1 < count))
        batch = Layout(made, True, torch.device("cpu")).batch([index] * 2, torch.tensor([1.0, 0.0]))
        accelerator = type("of", (), {"process_index": index, "num_processes": 2, "device": torch.device("cpu")})
        together, mine = Ranks(accelerator).gather(batch, frozenset())
    assert together.whole.num_rows == 4 and len(mine) == 2 * turns[1]
    assert tc.tree.build(together).batch.num_rows == 4


def slice_of(batch, low, high):
    return [r for r, t in enumerate(batch.trajectory_ids.tolist()) if low <= t < high]


def test_a_layout_of_dialogues_that_differ_in_length():
    long, short = (Dialogue(Problem("t", "q", "", float), [7]) for _ in range(2))
    for d, turns in ((long, 3), (short, 1)):
        for k in range(turns):
            d.say([k], [-1.0], "", True)
            d.hear([9] * (k + 1 < turns))
    batch = Layout([long, short], True, torch.device("cpu")).batch([0, 0], torch.tensor([1.0, math.nan]))
    assert batch.tokens.tolist() == [0, 1, 2, 0] and batch.rewards.tolist() == [1, 1, 1, 0]
    assert batch.input("prompt_tokens").tolist() == [[-1] * 4 + [7], [-1, -1, 7, 0, 9], [7, 0, 9, 1, 9], [-1] * 4 + [7]]
    assert dataclasses.replace(batch).whole.turns.counts.tolist() == [3, 1]
