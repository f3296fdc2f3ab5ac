import random

import pytest

pytest.importorskip("minigrid")

from tokcredit.environments.grids import ACTIONS, WORDS, Grid, Walks, names
from tokcredit.train.tiny import tokenizer

SOLVED = ("Empty-Random-6x6", "DoorKey-5x5", "LavaGapS5", "Unlock")


def test_a_world_in_words():
    grid = Grid("DoorKey-5x5")
    seen = grid.reset(3)
    objects = "goal 2 ahead 1 right, locked yellow door 1 ahead 1 left, yellow key 1 right"
    assert seen.text == f"ahead wall, left empty, right yellow key, {objects}, carrying nothing"
    assert seen.state == (
        "at 1,2 facing east, locked yellow door at 2,1, yellow key at 1,3, goal at 3,3, carrying empty"
    )
    assert (seen.reward, seen.done, seen.score) == (0, False, None)
    said = [grid.step(action).text for action in ("right", "I pickup it.", "left, no, right", "drop", "jump")]
    assert said[0].startswith(
        "ahead yellow key, left wall, right wall, goal 1 ahead 2 left, locked yellow door 1 behind"
    )
    assert said[1].endswith("carrying yellow key") and said[2].startswith("ahead wall, left empty")
    assert said[3].endswith("carrying yellow key"), "a wall is ahead"
    assert said[4] == f"invalid, {said[3]}"
    assert "use the key to open the door" in grid.introduction and all(a in grid.introduction for a in ACTIONS)


@pytest.mark.parametrize("world", SOLVED)
def test_the_best_actions_are_a_shortest_path(world):
    grid = Grid(world, progress=True)
    first = grid.reset(5)
    left = grid.left()
    assert first.score == 0 and left > 1
    seen, scores = first, []
    for taken in range(left):
        assert not seen.done and grid.left() == left - taken
        seen = grid.step(grid.best())
        scores.append(seen.score)
    assert seen.done and seen.reward > 0
    assert scores == pytest.approx([(k + 1) / left for k in range(left)])


def test_distances_are_those_of_a_plain_search():
    """Each state is at most one action away from those that its actions lead to, and some action is nearer."""
    grid, generator = Grid("DoorKey-5x5"), random.Random(0)
    for seed in range(2):
        taken = []
        grid.reset(seed)
        for _ in range(6):
            left = grid.left()
            following = []
            for action in ACTIONS:
                grid.reset(seed)
                done = [grid.step(a) for a in [*taken, action]][-1].done
                following.append(0 if done else grid.left())
            assert left == 1 + min(following)
            grid.reset(seed)
            taken.append(generator.choice(ACTIONS))
            if [grid.step(a) for a in taken][-1].done:
                break


def test_a_dead_end_has_the_lowest_score():
    grid = Grid("LavaGapS5", progress=True)
    seen = grid.reset(1)
    assert seen.text.startswith("ahead lava")
    dead = grid.step("forward")
    assert dead.done and dead.reward == 0 and dead.score == -1


def test_equal_states_have_equal_keys():
    grid = Grid("DoorKey-5x5")
    first = grid.reset(3)
    seen = [grid.step(action) for action in ("left", "right", "right", "left")]
    assert seen[1] == seen[3] == first
    assert len({first.state, seen[0].state, seen[2].state}) == 3
    assert Grid("DoorKey-5x5").reset(4).state != first.state


def test_walks():
    walks, words = Walks("DoorKey-5x5", worlds=4), tokenizer(WORDS)
    texts = [walks(random.Random(number), 0.0) for number in range(8)]
    assert texts[0] == walks(random.Random(0), 0.0)
    for text in texts:
        ids = words(text).input_ids
        assert words.unk_token_id not in ids and words.decode(ids) == text
        assert len(ids) < 32 * text.count("\n"), "most words are one token"
        assert set(text.split("\n")[1::2]) <= set(ACTIONS) and "forward" in text
    wrong = walks(random.Random(0), 1.0)
    assert wrong != texts[0] and "drop" not in wrong


def test_a_world_with_too_many_states_has_no_distances(monkeypatch):
    monkeypatch.setattr("tokcredit.environments.shortest._MOST", 20)
    with pytest.raises(ValueError, match="progress: expected a world with at most 20 states, got more"):
        Grid("DoorKey-5x5", progress=True).reset(1)


def test_names():
    assert {"DoorKey-5x5", *SOLVED} <= set(names())
