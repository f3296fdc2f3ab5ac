import subprocess
import sys

import pytest
from tokcredit.environments import Observation
from tokcredit.environments.playing import play

PLACE = f"{__name__}:Counter"


class Counter:
    """Counts its steps up to a number, and then does what it is told."""

    introduction = "count"

    def __init__(self, end=2, wrong="nothing"):
        self.end, self.wrong = end, wrong

    def reset(self, seed):
        self.count = seed
        return Observation(f"begin {seed}", str(seed))

    def step(self, action):
        self.count += 1
        seen = Observation(f"{action} {self.count}", str(self.count), 1, self.count == self.end, 0)
        changes = {"text": {"text": 3}, "state": {"state": None}, "reward": {"reward": float("inf")}}
        changes |= {"surrogate": {"text": "\ud800"}, "score": {"score": float("nan")}, "none": {"reward": None}}
        return () if self.wrong == "type" else seen._replace(**changes.get(self.wrong, {}))


def test_an_episode_is_played_from_its_beginning():
    expected = {"text": "b 2", "state": "2", "reward": 1.0, "done": True, "score": 0.0, "introduction": "count"}
    for _ in range(2):
        assert play(PLACE, "{}", 0, ("a", "b")) == expected
    assert play(PLACE, '{"end": 9}', 5, ()) == expected | {
        "text": "begin 5",
        "state": "5",
        "reward": 0.0,
        "done": False,
        "score": None,
    }


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("type", TypeError, "observation: expected Observation, got tuple"),
        ("text", TypeError, "text: expected a text, got int"),
        ("surrogate", ValueError, "surrogates not allowed"),
        ("state", TypeError, "state: expected a text, got NoneType"),
        ("reward", ValueError, "reward, score: expected finite numbers, got inf, 0.0"),
        ("score", ValueError, "reward, score: expected finite numbers, got 1.0, nan"),
        ("none", TypeError, "NoneType"),
    ],
)
def test_wrong_observations_are_errors(wrong, error, message):
    with pytest.raises(error, match=message):
        play(PLACE, f'{{"wrong": "{wrong}"}}', 0, ("a",))


def test_nothing_follows_the_end():
    with pytest.raises(ValueError, match="done: expected False before the last action, got True"):
        play(PLACE, "{}", 0, ("a", "b", "c"))


def test_environments_import_no_torch():
    """They are imported as the worker of bounded calls does it: without the package itself."""
    code = """
import importlib.util, sys, types
package = types.ModuleType("tokcredit")
package.__path__ = list(importlib.util.find_spec("tokcredit").submodule_search_locations)
sys.modules["tokcredit"] = package
from tokcredit.environments import games, grids, playing
print(*sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tokcredit.environments.games" in out and not {"torch", "numpy", "gymnasium", "textarena"} & set(out)
