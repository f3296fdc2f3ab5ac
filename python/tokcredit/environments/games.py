"""Games of textarena for one player. Games with word lists need data of nltk, which is not part of the package."""

from __future__ import annotations

from typing import Any

from tokcredit.environments import Observation


class Game:
    """A game of textarena. The model is told the rules, and writes its move as they say, for example ``[right]``.

    The reward is that of textarena at the end of the game, else 0.

    Args:
        game: Name of the game, such as ``FrozenLake-v0``.

    Attributes:
        introduction: Empty: the rules are the first observation.
    """

    introduction = ""

    def __init__(self, game: str) -> None:
        import textarena

        self._kinds = textarena.core.ObservationType
        self._make = lambda: textarena.make(f"{game}-raw")
        self._game: Any = None
        self._before = ""

    def reset(self, seed: int) -> Observation:
        """Begin a game and return its rules.

        Args:
            seed: Seed of the game.
        """
        self._game = self._make()
        self._game.reset(num_players=1, seed=seed)
        self._before = f"seed {seed}"
        return self._seen()

    def step(self, action: str) -> Observation:
        """Make a move.

        Args:
            action: Text with the move.
        """
        done, _ = self._game.step(action)
        seen = self._seen()
        if not done:
            return seen
        rewards, facts = self._game.close()
        text = "\n\n".join(filter(None, (seen.text, str(facts[0].get("reason", "")))))
        return seen._replace(text=text, reward=float(rewards[0]), done=True)

    def _seen(self) -> Observation:
        """Return what is new. The state is the last board, or all that was said where there are no boards."""
        _, messages = self._game.get_observation()
        new = [(text, kind) for _, text, kind in messages if kind != self._kinds.PLAYER_ACTION]
        self._before += "".join(f"\n{text}" for _, text, _ in messages)
        boards = [text for text, kind in new if kind == self._kinds.GAME_BOARD]
        return Observation("\n\n".join(text.strip() for text, _ in new), boards[-1] if boards else self._before)
