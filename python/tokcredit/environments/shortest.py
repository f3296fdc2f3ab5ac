"""Shortest paths through a world of minigrid, by a search of its states."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

_ACTIONS = (0, 1, 2, 3, 5)
_WITH_DROP = (*_ACTIONS, 4)
_MOST = 5_000

State = tuple[Any, ...]


def things(world: Any) -> Iterator[tuple[int, Any]]:
    """Yield the objects of a world other than walls and floors, each with the number of its cell.

    Args:
        world: A world of minigrid.
    """
    return ((at, x) for at, x in enumerate(world.grid.grid) if x is not None and x.type not in ("wall", "floor"))


def _key(world: Any) -> State:
    """Return the state of a world: position and direction of the agent, what it carries, and the objects."""
    carried = world.carrying and (world.carrying.type, world.carrying.color)
    objects = (
        (at, x.type, x.color, getattr(x, "is_open", None), getattr(x, "is_locked", None)) for at, x in things(world)
    )
    return (tuple(map(int, world.agent_pos)), int(world.agent_dir), carried, *objects)


class _Saved:
    """A state that a world can return to."""

    def __init__(self, world: Any) -> None:
        self._at = (world.agent_pos, world.agent_dir, world.carrying, world.step_count)
        self._cells = list(world.grid.grid)
        self._doors = [(x, x.is_open, x.is_locked) for x in self._cells if x is not None and x.type == "door"]

    def restore(self, world: Any) -> None:
        world.agent_pos, world.agent_dir, world.carrying, world.step_count = self._at
        world.grid.grid = list(self._cells)
        for door, is_open, is_locked in self._doors:
            door.is_open, door.is_locked = is_open, is_locked


class Paths:
    """The number of actions that are left to the goal from each state that was searched."""

    def __init__(self) -> None:
        self._left: dict[State, int | None] = {}
        self._next: dict[State, int] = {}
        self._searched: set[tuple[State, tuple[int, ...]]] = set()

    def left(self, world: Any) -> int | None:
        """Return the smallest number of actions to the goal, or None if it cannot be reached. The world stays as it is.

        An action is the goal if minigrid rewards it. Objects are dropped only where nothing else leads to the goal.

        Args:
            world: A world of minigrid.

        Raises:
            ValueError: There are too many states.
        """
        here = _key(world)
        for actions in (_ACTIONS, _WITH_DROP):
            if self._left.get(here) is None and (here, actions) not in self._searched:
                self._search(world, actions)
        return self._left[here]

    def best(self, world: Any) -> int | None:
        """Return the number of an action of a shortest path, or None if there is no path.

        Args:
            world: A world of minigrid.
        """
        return None if self.left(world) is None else self._next[_key(world)]

    def _search(self, world: Any, actions: tuple[int, ...]) -> None:
        start, first = _Saved(world), _key(world)
        waiting, before = deque([(first, start)]), dict[State, list[tuple[State, int]]]({first: []})
        ends: dict[State, int] = {}
        while waiting:
            state, saved = waiting.popleft()
            for action in actions:
                saved.restore(world)
                world.step_count = 0  # the limit of steps is no property of a state
                _, reward, over, _, _ = world.step(action)
                if over:
                    if reward > 0:
                        ends.setdefault(state, action)
                    continue
                found = _key(world)
                if found not in before:
                    if len(before) == _MOST:
                        raise ValueError(f"progress: expected a world with at most {_MOST} states, got more")
                    before[found] = []
                    waiting.append((found, _Saved(world)))
                before[found].append((state, action))
        start.restore(world)
        self._searched |= {(state, actions) for state in before}
        self._left |= dict.fromkeys(before)
        self._left |= dict.fromkeys(ends, 1)
        self._next |= ends
        reached = deque(ends)
        while reached:
            state = reached.popleft()
            for earlier, action in before[state]:
                if self._left[earlier] is None:
                    self._left[earlier], self._next[earlier] = (self._left[state] or 0) + 1, action
                    reached.append(earlier)
