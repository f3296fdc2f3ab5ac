"""rLLM's episodes, as its sources define them. rLLM itself is not on PyPI."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tokcredit as tc

sys.path.insert(0, str(Path(__file__).parent))

import recipes
from tokcredit.adapters import rllm


@dataclass
class Step:
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float] | None = None
    reward: float | None = 0.0
    mc_return: float = 0.0
    advantage: list[float] | float | None = None


@dataclass
class Trajectory:
    uid: str
    name: str
    steps: list[Step]
    reward: float | None = 0.0


@dataclass
class Episode:
    id: str
    trajectories: list[Trajectory] = field(default_factory=list)


def trajectory(uid, name, reward, *rewards_of_steps, **settings):
    steps = [Step([1], [5] * (k + 1), [-1.0] * (k + 1), x) for k, x in enumerate(rewards_of_steps)]
    return Trajectory(uid, name, steps, reward, **settings)


def episodes():
    """Two tasks; in the first a solver and a judge, whose trajectories are groups of their own."""
    return [
        Episode("a:b:0", [trajectory("u0", "solver", 1.0, 0.5, 2.0), trajectory("u1", "judge", 4.0, 0.0)]),
        Episode("a:b:1", [trajectory("u2", "solver", 0.0, 1.0), trajectory("u3", "judge", 1.0, 0.0, 0.0)]),
        Episode("c:0", [trajectory("u4", "solver", 9.0, 0.0)]),
        Episode("c:1", [trajectory("u5", "solver", 3.0, 0.0)]),
    ]


def advantages(whole):
    return {t.uid: [step.advantage for step in t.steps] for e in whole for t in e.trajectories}


def test_outcomes_of_trajectories():
    whole = episodes()
    rllm.assign(tc.methods.rloo(), whole)
    assert advantages(whole) == {
        "u0": [[1.0], [1.0, 1.0]],
        "u1": [[3.0]],
        "u2": [[-1.0]],
        "u3": [[-3.0], [-3.0, -3.0]],
        "u4": [[6.0]],
        "u5": [[-6.0]],
    }


def test_rewards_of_steps():
    whole = episodes()
    recipes.run("rLLM")["credit"](whole)
    found = advantages(whole)
    assert found["u0"] == [[0.5 + 2.0], [2.0, 2.0]] and found["u2"] == [[1.0]]
    assert found["u5"] == [[0.0]]
    last = episodes()
    rllm.assign(tc.methods.rloo(), last, reward_rule="last")
    assert advantages(last)["u0"] == [[1.0], [1.0, 1.0]]


def test_no_steps():
    rllm.assign(tc.methods.rloo(), [Episode("a:0")])


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            lambda e: setattr(e[0].trajectories[0], "reward", None),
            {},
            "Trajectory.reward: expected a number, got None in",
        ),
        (
            lambda e: setattr(e[0].trajectories[0].steps[1], "reward", None),
            {"reward_rule": "sum"},
            "Step.reward: expected a number, got None in row 1, of trajectory 'u0'",
        ),
        (
            lambda e: setattr(e[2].trajectories[0], "uid", "u0"),
            {},
            r"Episode.id, Trajectory.name: expected one group in all rows of Trajectory.uid 'u0', got \('c', 'so",
        ),
        (
            lambda e: None,
            {"reward_rule": "split"},
            r"Step.reward: expected the same reward \(reward_rule 'split'\) in all",
        ),
        (lambda e: None, {"reward_rule": "mean"}, "reward_rule: expected one of same, last, split, sum, got 'mean'"),
    ],
)
def test_episodes_that_are_refused(change, settings, message):
    whole = episodes()
    change(whole)
    with pytest.raises(ValueError, match=message):
        rllm.assign(tc.methods.rloo(), whole, **settings)
    assert all(step is None for rows in advantages(whole).values() for step in rows)
