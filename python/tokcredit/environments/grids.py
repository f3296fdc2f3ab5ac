"""The grid worlds of minigrid in words: an agent turns, walks, picks up keys and opens doors to reach a goal.

The words say what lies beside the agent, where objects are, seen from it, and what it carries::

    ahead wall, left empty, right empty, goal 1 ahead 2 right, yellow key 2 right, carrying nothing
"""

from __future__ import annotations

import functools
import os
import random
import re
from typing import Any

from tokcredit.environments import Observation
from tokcredit.environments.shortest import Paths, things

ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle")
"""The actions, in the order of minigrid's numbers."""

_COLORS = ("red", "green", "blue", "purple", "yellow", "grey")
_OBJECTS = ("key", "ball", "box", "door", "goal", "lava", "wall", "empty")
_OTHERS = ("ahead", "behind", "here", "locked", "closed", "open", "carrying", "nothing", "invalid")
_BARE = (*ACTIONS, *_COLORS, *_OBJECTS, *_OTHERS)
WORDS = (*(f" {word}" for word in (*_BARE, *"0123456789")), *_BARE)
"""Words of observations and actions, with the space before them and without."""

_DIRECTIONS = ("east", "south", "west", "north")
_COLORED = ("key", "ball", "box", "door")


@functools.cache
def gymnasium() -> Any:
    """Return the module gymnasium, in which the worlds of minigrid are registered."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import gymnasium
    import minigrid

    assert minigrid.__version__  # the import registers the worlds
    return gymnasium


def names() -> list[str]:
    """Return the names of the worlds, such as ``DoorKey-5x5``."""
    return sorted(x[len("MiniGrid-") : -len("-v0")] for x in gymnasium().registry if x.startswith("MiniGrid-"))


class Grid:
    """A world of minigrid, in which an action is one word. A text without a word of an action changes nothing.

    The reward is that of minigrid: ``1 - 0.9 * steps / limit`` at the goal, with the limit of the world, else 0.

    Args:
        world: Name of the world; see :func:`names`.
        progress: Whether states have scores: 0 at the beginning, 1 at the goal, in between by the number of actions
            that are left, and -1 where the goal cannot be reached any more. The world must not move by itself.

    Attributes:
        introduction: Instruction for models with a chat template, after :meth:`reset`.
    """

    def __init__(self, world: str, progress: bool = False) -> None:
        self._world = gymnasium().make(f"MiniGrid-{world}-v0", disable_env_checker=True).unwrapped
        self._paths, self._seed = Paths(), -1
        self._progress, self._first, self.introduction = progress, 1, ""

    def reset(self, seed: int) -> Observation:
        """Begin an episode and return what the agent sees.

        Args:
            seed: Seed of the world.
        """
        self._world.reset(seed=seed)
        if seed != self._seed:
            self._paths, self._seed = Paths(), seed
        self.introduction = (
            f"You are in a grid world. Your mission: {self._world.mission}. Answer each observation with one action "
            f"and nothing else: {', '.join(ACTIONS)}. The actions left and right turn you, forward moves you, pickup "
            f"takes what is ahead of you, drop puts it down, and toggle opens what is ahead of you."
        )
        if self._progress:
            self._first = self.left() or 1
        return self._seen()

    def step(self, action: str) -> Observation:
        """Carry out the last word of a text that is an action.

        Args:
            action: The text.
        """
        words = [word for word in re.findall("[a-z]+", action.lower()) if word in ACTIONS]
        if not words:
            return self._seen(invalid=True)
        _, reward, over, cut, _ = self._world.step(ACTIONS.index(words[-1]))
        return self._seen(float(reward), bool(over), bool(cut))

    def left(self) -> int | None:
        """Return the smallest number of actions that lead to the goal, or None if none do."""
        return self._paths.left(self._world)

    def best(self) -> str:
        """Return an action of a shortest path to the goal, or ``forward`` if there is no path."""
        action = self._paths.best(self._world)
        return "forward" if action is None else ACTIONS[action]

    def _seen(self, reward: float = 0.0, over: bool = False, cut: bool = False, invalid: bool = False) -> Observation:
        score = None
        if self._progress:
            left = 0 if reward > 0 else None if over else self.left()
            score = -1.0 if left is None else 1 - left / self._first
        text = self._text()
        return Observation(f"invalid, {text}" if invalid else text, self._state(), reward, over or cut, score)

    def _state(self) -> str:
        """Return where the agent and all objects are, in coordinates from the upper left."""
        w = self._world
        x, y = map(int, w.agent_pos)
        objects = [f"{_name(thing)} at {at % w.width},{at // w.width}" for at, thing in things(w)]
        return ", ".join([f"at {x},{y} facing {_DIRECTIONS[w.agent_dir]}", *objects, f"carrying {_name(w.carrying)}"])

    def _text(self) -> str:
        w = self._world
        (x, y), (east, south) = map(int, w.agent_pos), map(int, w.dir_vec)
        beside = {"ahead": (east, south), "left": (south, -east), "right": (-south, east)}
        parts = [f"{side} {_name(w.grid.get(x + dx, y + dy))}" for side, (dx, dy) in beside.items()]
        objects = []
        for at, thing in things(w):
            dx, dy = at % w.width - x, at // w.width - y
            ahead, right = dx * east + dy * south, dy * east - dx * south
            objects.append(f"{_name(thing)} {_place(ahead, right)}")
        carried = "nothing" if w.carrying is None else _name(w.carrying)
        return ", ".join([*parts, *sorted(objects), f"carrying {carried}"])


class Walks:
    """Random walks through a world as text, which is what a model without a chat template reads and says.

    Args:
        world: Name of the world; see :func:`names`.
        worlds: Number of different seeds.
        turns: Largest number of actions.
    """

    def __init__(self, world: str, worlds: int = 64, turns: int = 16) -> None:
        self._world, self._worlds, self._turns = world, worlds, turns
        self._made: dict[int, Grid] = {}

    def __call__(self, generator: random.Random, noise: float) -> str:
        """Return the observations and actions of a walk, each on a line. Actions lead to the goal, except for mistakes.

        Args:
            generator: Source of randomness.
            noise: Probability that an action is random.
        """
        seed = generator.randrange(self._worlds)
        grid = self._made.setdefault(seed, Grid(self._world))
        seen, text = grid.reset(seed), ""
        for _ in range(self._turns):
            action = (
                generator.choice([x for x in ACTIONS if x != "drop"]) if generator.random() < noise else grid.best()
            )
            text += f"{seen.text}\n{action}\n"
            seen = grid.step(action)
            if seen.done:
                break
        return text


def _place(ahead: int, right: int) -> str:
    """Return where something is, such as ``2 ahead 1 left``."""
    words = [f"{abs(ahead)} {'ahead' if ahead > 0 else 'behind'}"] if ahead else []
    words += [f"{abs(right)} {'right' if right > 0 else 'left'}"] if right else []
    return " ".join(words) or "here"


def _name(thing: Any) -> str:
    if thing is None or thing.type == "floor":
        return "empty"
    if thing.type not in _COLORED:
        return str(thing.type)
    state = ""
    if thing.type == "door":
        state = "open " if thing.is_open else "locked " if thing.is_locked else "closed "
    return f"{state}{thing.color} {thing.type}"
