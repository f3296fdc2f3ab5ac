"""Advantages in the nodes of traces of verifiers, read back through its own branches."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tokcredit as tc

if importlib.util.find_spec("verifiers") is None:
    pytest.skip("verifiers is not installed; make test-others", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import absent
import recipes

# What its environments, sandboxes and judges import; traces need none of it.
absent.without_init("verifiers", "verifiers.v1")
absent.pretend("connectrpc", "math_verify", "opentelemetry", "prime_runs", "prime_sandboxes", "prime_tunnel")

from tokcredit.adapters import verifiers as adapter
from verifiers.v1.episode import Episode
from verifiers.v1.graph import MessageNode
from verifiers.v1.trace import AgentInfo, Reward, Trace, TraceTask, VersionInfo
from verifiers.v1.types import AssistantMessage, UserMessage

RETURNS = tc.Objective(tc.credit.returns(discount=0.5))


def said(parent, tokens, **fields):
    """A message of the user."""
    return MessageNode(parent=parent, message=UserMessage(content="x"), token_ids=tokens, mask=[False] * len(tokens))


def sampled(parent, tokens, scaffold=1):
    """A message of the model: a token of the template, then sampled ones."""
    mask = [False] * scaffold + [True] * (len(tokens) - scaffold)
    log_probs = [-1.0] * (len(tokens) - scaffold)
    message = AssistantMessage(content="y")
    return MessageNode(parent=parent, message=message, sampled=True, token_ids=tokens, mask=mask, logprobs=log_probs)


def trace(reward, *nodes, key="t", agent="solver", trainable=True, **info):
    rewards = {"right": Reward(score=reward), "form": Reward(score=1.0, weight=0.0)}
    return Trace.model_construct(
        id=f"{key}{reward}",
        verifiers=VersionInfo.model_construct(version="0.4.0"),
        task=TraceTask.model_construct(type="T", data=None, key=key, hash=None),
        agent=AgentInfo.model_construct(config=None, name=agent, trainable=trainable),
        nodes=list(nodes),
        rewards=rewards,
        info=info,
        calls=[],
        mm_token_type_id_map={},
    )


def branching(reward, **fields):
    """The first answer (2 sampled tokens) is in both branches; each ends with an answer of its own (1 and 2)."""
    nodes = [said(None, [1]), sampled(0, [9, 2, 3]), said(1, [4]), sampled(2, [9, 5]), sampled(1, [6, 7], 0)]
    return trace(reward, *nodes, **fields)


def short(reward, **fields):
    return trace(reward, said(None, [1]), sampled(0, [9, 8]), **fields)


def test_advantages_of_nodes():
    """A node that two branches share trains once, and a trace counts once in its group."""
    traces = [branching(1.0), short(0.0), short(0.5)]
    adapter.assign(tc.methods.rloo(), traces)
    assert [node.advantages for node in traces[0].nodes] == [None, [0.75, 0.75], None, [0.75], [0.75, 0.75]]
    assert traces[1].nodes[1].advantages == [-0.75] and traces[2].nodes[1].advantages == [0.0]
    first, second = traces[0].branches
    assert first.advantages == [0.0, 0.0, 0.75, 0.75, 0.0, 0.0, 0.75]
    assert second.advantages == [0.0, 0.0, 0.75, 0.75, 0.75, 0.75]


def test_rewards_of_turns():
    """The outcome is at the last token, the reward of a turn at its own."""
    traces = [branching(4.0, turn_rewards=[1.0, 0.0, 2.0])]
    adapter.assign(RETURNS, traces, turn_rewards="turn_rewards")
    last = 4.0 + 2.0
    third = 0.25 * last
    assert [node.advantages for node in traces[0].nodes if node.sampled] == [
        [0.5 * (1 + 0.5 * third), 1 + 0.5 * third],
        [third],
        [0.5 * last, last],
    ]


def test_rewards_of_turns_may_sum_to_the_outcome():
    """By chance they do in every trace; both count."""
    traces = [short(2.0, turn_rewards=[2.0])]
    adapter.assign(RETURNS, traces, turn_rewards="turn_rewards")
    assert traces[0].nodes[1].advantages == [4.0]


def test_groups():
    """Tasks and agents are groups of their own, and those that are not trained have no advantages."""
    traces = [short(1.0), short(0.0, key="u"), short(3.0, agent="judge"), short(5.0, trainable=False), short(0.0)]
    adapter.assign(tc.methods.rloo(), traces)
    assert [t.nodes[1].advantages for t in traces] == [[1.0], [0.0], [0.0], None, [-1.0]]
    traces = [short(1.0), short(0.0, key="u")]
    adapter.assign(tc.methods.rloo(), traces, ["g", "g"])
    assert [t.nodes[1].advantages for t in traces] == [[1.0], [-1.0]]
    adapter.assign(tc.methods.rloo(), [])


def test_log_probs_of_nodes():
    """Those of the engine are there always; others where every branch has them."""
    traces = [short(1.0), short(0.0)]
    weighted = tc.Objective(token_weights=(tc.token_weights.importance(high=2.0),))
    with pytest.raises(ValueError, match=r"verifiers with this batch carries .* requires old_log_probs"):
        adapter.assign(weighted, traces)
    for t in traces:
        t.nodes[1].trainer_logprobs = [-0.5]
    adapter.assign(tc.Objective(), plain := [short(1.0), short(0.0)])
    adapter.assign(weighted, traces)
    ratio = 2.718281828**0.5
    assert traces[0].nodes[1].advantages == pytest.approx([plain[0].nodes[1].advantages[0] * ratio], rel=1e-5)


@pytest.mark.parametrize(
    ("traces", "settings", "message"),
    [
        (
            [trace(1.0, key=None)],
            {},
            r"group_ids: expected groups, because trace None1\.0 names no task",
        ),
        ([short(1.0)], {"group_ids": [1, 2]}, "group_ids: expected one for each of 1 traces, got 2"),
        ([short(1.0)], {"turn_rewards": "x"}, r"info\['x'\]: expected 1 numbers in trace t1.0, .* got None"),
        ([short(1.0, x=[1.0, 2.0])], {"turn_rewards": "x"}, r"info\['x'\]: expected 1 numbers in trace t1.0, one for"),
        (
            [short(1.0, x=[float("nan")])],
            {"turn_rewards": "x"},
            r"info\['x'\]: expected finite numbers, got nan in row 0",
        ),
    ],
)
def test_traces_that_are_refused(traces, settings, message):
    with pytest.raises(ValueError, match=message):
        adapter.assign(tc.methods.rloo(), traces, **settings)


@pytest.mark.parametrize("rewards", [{}, {"right": None}])
def test_traces_without_scores(rewards):
    one = short(1.0)
    one.rewards = rewards
    with pytest.raises(ValueError, match=r"rewards: expected a score for each reward of trace t1\.0, got None for"):
        adapter.assign(tc.methods.rloo(), [one])


def test_recipe():
    """As ``docs/hosts.md`` prints it."""
    traces = [branching(1.0), short(0.0)]
    recipes.run("verifiers")["credit"](traces)
    assert traces[0].nodes[1].advantages == [1.0, 1.0] and traces[1].nodes[1].advantages == [-1.0]


class Algorithm:
    """The base of prime-rl's algorithms, as its sources have it."""

    def __init__(self, config, policy_pool):
        self.policy_pool = policy_pool

    async def score_group(self, episodes):
        pass

    async def finalize_group(self, episodes):
        await self.score_group(episodes)


def episode(*traces):
    return Episode.model_construct(traces=list(traces))


def test_an_algorithm_of_prime_rl(monkeypatch):
    """The class of the guide, called as prime-rl does: a cohort is a group, and what does not train has no credit."""
    base = ModuleType("prime_rl.orchestrator.algo.base")
    base.Algorithm = Algorithm
    monkeypatch.setitem(sys.modules, base.__name__, base)
    names = recipes.run("prime-rl", 0)
    failed, judge, silent = short(9.0), short(9.0, trainable=False), trace(9.0, said(None, [1]))
    failed.ok = False
    traces = [short(1.0), short(0.0, key="other")]
    for t in (*traces, judge, silent):
        t.ok = True
    cohort = [episode(traces[0], judge), episode(traces[1], failed), episode(silent)]
    asyncio.run(names["Rloo"](None, None).finalize_group(cohort))
    assert [t.nodes[1].advantages for t in (*traces, judge, failed)] == [[1.0], [-1.0], None, None]
    assert silent.nodes[0].advantages is None
    asyncio.run(names["Rloo"](None, None).finalize_group([]))


def test_trees_over_branches():
    """Branches hold all that the policy saw, so equal beginnings are one node and a trace counts once at it."""
    traces = [branching(1.0), trace(0.0, said(None, [1]), sampled(0, [9, 2, 8])), short(0.0)]
    adapter.assign(tc.methods.tempo(scale=False), traces)
    # The mean is 1/3; V is 1/2 after 2, and 1 after 3.
    first = [node.advantages for node in traces[0].nodes if node.sampled]
    assert first == [pytest.approx([2 / 3 + 1 / 6, 2 / 3 + 1 / 2]), pytest.approx([2 / 3]), pytest.approx([2 / 3] * 2)]
    assert traces[1].nodes[1].advantages == pytest.approx([-1 / 3 + 1 / 6, -1 / 3 - 1 / 2])
