"""Tasks in which the model acts in an environment: the worlds they begin in, and how episodes are played in them."""

from __future__ import annotations

import functools
import json
import random
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from tokcredit import environments
from tokcredit.environments import Observation
from tokcredit.rewards.bounded import BoundedCalls, Failure
from tokcredit.settings import Range, nearest
from tokcredit.train.problems import Problem, World

_PLAYING = Path(environments.__file__).with_name("playing.py")
_SECONDS = 10.0
"""Limit of the processor time in which an episode is played up to a step."""

_Count = Annotated[int, Range("whole number", at_least=1)]


@functools.cache
def _calls() -> BoundedCalls:
    """Return the calls of the environments of this process, which run in processes with limits."""
    return BoundedCalls(_PLAYING, "play", _SECONDS)


def play(episodes: Sequence[tuple[World, Sequence[str]]]) -> list[Observation | Failure]:
    """Return the last observation of each episode, or why there is none.

    Args:
        episodes: World and actions of each.
    """
    calls = [(world.path, world.settings, world.seed, tuple(actions)) for world, actions in episodes]
    return [x if isinstance(x, Failure) else _observation(x) for x in _calls()(calls)]


def _observation(found: dict[str, Any]) -> Observation:
    return Observation(**{name: found[name] for name in Observation._fields})


def _no_reward(response: str) -> float:
    raise RuntimeError("reward: expected a task without an environment, whose episodes have the rewards, got one")


def _problems(task: str, path: str, settings: dict[str, Any], size: int, seed: int) -> list[Problem]:
    """Return problems in different worlds, as far as their first states differ."""
    given = [repr(path)] if task == "environment" else []
    given += [f"{name}={value!r}" for name, value in settings.items()]
    name, own = f"{task}({', '.join(given)})", json.dumps(settings)
    seeds = random.Random(seed).sample(range(2**31), size)
    problems: dict[str, Problem] = {}
    for number, found in zip(seeds, _calls()([(path, own, number, ()) for number in seeds]), strict=True):
        if isinstance(found, Failure):
            raise ValueError(
                f"tasks: {name}: expected an environment that begins with seed {number}, got {found.reason}"
            )
        seen, introduction = _observation(found), found["introduction"]
        world = World(name, path, own, number, seen.state)
        problem = Problem(task, seen.text, "", _no_reward, introduction=introduction, world=world)
        problems.setdefault(seen.state, problem)
    return list(problems.values())


def _required(package: str, task: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f'tasks: {task} needs the package {package}: pip install "tokcredit[agents]"')


def _minigrid(
    world: str = "Empty-Random-6x6", progress: bool = False, size: _Count = 200, seed: int = 0
) -> list[Problem]:
    """Return worlds of minigrid in words; see :class:`tokcredit.environments.grids.Grid`."""
    _required("minigrid", "minigrid")
    from tokcredit.environments import grids

    if world not in (known := grids.names()):
        raise ValueError(
            f"tasks: minigrid: world: expected a name as Empty-Random-6x6, got {world!r}{nearest(world, known)}"
        )
    settings = {"world": world, "progress": progress} if progress else {"world": world}
    return _problems("minigrid", "tokcredit.environments.grids:Grid", settings, size, seed)


def _textarena(game: str, size: _Count = 200, seed: int = 0) -> list[Problem]:
    """Return games of textarena for one player; see :class:`tokcredit.environments.games.Game`."""
    _required("textarena", "textarena")
    return _problems("textarena", "tokcredit.environments.games:Game", {"game": game}, size, seed)


def _environment(path: str, size: _Count = 200, seed: int = 0, **settings: Any) -> list[Problem]:
    """Return worlds of a class of the user, ``package.module:Class``: a :class:`tokcredit.environments.Environment`."""
    if ":" not in path:
        raise ValueError(f"tasks: environment: path: expected package.module:Class, got {path!r}")
    try:
        json.dumps(settings)
    except TypeError as error:
        raise ValueError(f"tasks: environment: expected settings that JSON can hold, got {settings}: {error}") from None
    return _problems("environment", path, settings, size, seed)


TASKS: dict[str, Callable[..., list[Problem]]] = {
    "minigrid": _minigrid,
    "textarena": _textarena,
    "environment": _environment,
}
"""The tasks by name."""


def split(problems: Sequence[Problem], held_out: float) -> tuple[list[Problem], list[Problem]]:
    """Return training and held-out worlds, by their seeds.

    Args:
        problems: Problems with a world.
        held_out: Share that is kept from training.
    """
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for p in problems:
        assert p.world is not None
        sides[zlib.crc32(str(p.world.seed).encode()) / 2**32 < held_out].append(p)
    return sides
