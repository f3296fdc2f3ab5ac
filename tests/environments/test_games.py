import importlib.util
import socket
import warnings

import pytest

if importlib.util.find_spec("textarena") is None:
    pytest.skip("needs textarena", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import textarena  # noqa: F401  its dependencies warn

from tokcredit.environments.games import Game


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*arguments):
        raise OSError("offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_game_to_its_end():
    game = Game("FrozenLake-v0")
    first = game.reset(3)
    assert first.text.startswith("Welcome to Frozen Lake!") and "|  P  |" in first.state and not first.done
    seen = [game.step(move) for move in ("[right]", "jump", "[left]", "[down]")]
    assert (
        seen[0].text.startswith("You moved right") and "Welcome" not in seen[0].text and "[right]\n" not in seen[0].text
    )
    assert "invalid move" in seen[1].text and seen[1].state == seen[0].state
    assert seen[2].state == first.state != seen[0].state
    assert [x.done for x in seen] == [False, False, False, True]
    assert seen[3].text.endswith("journey to the goal.") and 0 < seen[3].reward < 1
    assert [x.reward for x in seen[:3]] == [0, 0, 0]


@pytest.mark.parametrize("name", ["2048-v0-easy", "Mastermind-v0", "GuessTheNumber-v0"])
def test_games_are_deterministic(name):
    """Also where they draw random numbers in every step, and another game is played in between."""
    moves = ["[up]", "[left]", "[1 2 3 4]", "[7]", "[down]"]
    found = []
    for other in (0, 1):
        game, seen = Game(name), []
        game.reset(9 + other)
        seen.append(game.reset(5))
        seen += [game.step(move) for move in moves[: 3 + 2 * (name != "2048-v0-easy")] if not seen[-1].done]
        found.append(seen)
    assert found[0] == found[1]


def test_states_without_a_board_are_what_was_said():
    game = Game("GuessTheNumber-v0")
    first = game.reset(1)
    seen = [game.step(move) for move in ("[3]", "[5]")]
    again = Game("GuessTheNumber-v0")
    again.reset(1)
    assert again.step("[3]") == seen[0] and again.step("[6]") != seen[1]
    assert len({first.state, *(x.state for x in seen)}) == 3
