import json

import numpy as np
import pytest
from tokcredit import report
from tokcredit.report.summary import summarize

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

PER_TOKEN = ("tokens", "response_mask", "old_log_probs", "log_probs", "turn_ids", "anchor_ids", "turn_rewards")
EPISODE = {
    "group": 0,
    "prompt": "p",
    "tokens": [1, 2, 9, 3, 9, 5],
    "response_mask": [1, 1, 0, 1, 0, 1],
    "old_log_probs": [-1.0, -2.0, -3.0, -1.0, -1.0, -0.5],
    "log_probs": [-1.5, -2.0, -3.0, -0.8, -1.0, -0.5],
    "turn_ids": [0, 0, 0, 1, 1, 2],
    "anchor_ids": [-(2**62), 0, 0, 8, 0, -(2**62)],
    "turn_rewards": [0, 0.5, 0, 0, 0, 1.0],
    "reward": 1.0,
}
OTHER = {
    **EPISODE,
    "tokens": [1, 4],
    "response_mask": [1, 1],
    "old_log_probs": [-1.0, -1.0],
    "log_probs": [-1.0, -1.2],
    "turn_ids": [0, 0],
    "anchor_ids": [-(2**62), 0],
    "turn_rewards": [0, -0.25],
    "reward": 0.0,
}
ALONE = {**OTHER, "group": 1, "prompt": "q", "anchor_ids": [8, 0]}
ROWS = [EPISODE, OTHER, ALONE]


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def part(row, number, begin, end):
    return {**row, **{name: row[name][begin:end] for name in PER_TOKEN}, "trajectory": number}


def in_several_rows():
    """The same episodes, of which the first has three rows, and another stands between them."""
    return [
        part(EPISODE, 4, 0, 2),
        part(OTHER, 7, 0, 2),
        part(EPISODE, 4, 2, 5),
        part(EPISODE, 4, 5, 6),
        part(ALONE, 2, 0, 2),
    ]


def test_turns_by_hand(tmp_path):
    turns = report.compute(report.read(lines(tmp_path / "x.jsonl", ROWS)), ["gigpo"]).turns
    assert turns["rollout"].tolist() == [0, 0, 0, 1, 2]
    assert turns["begin"].tolist() == [0, 3, 5, 0, 0] and turns["end"].tolist() == [2, 4, 6, 2, 2]
    assert turns["reward"].tolist() == [0.5, 0, 1, -0.25, -0.25]
    # The state of the second turn occurs once in its group, and in another group.
    assert turns["state"].tolist() == [0, -1, 0, 0, -1]


def test_the_rows_of_an_episode_are_one_rollout(tmp_path):
    whole = report.compute(report.read(lines(tmp_path / "x.jsonl", ROWS)), ["gigpo", "ctpo"])
    run = report.read(lines(tmp_path / "y.jsonl", in_several_rows()))
    assert run.batch.num_rows == 5
    cut = report.compute(run, ["gigpo", "ctpo"])
    for mine, other in [
        *((getattr(whole, name), getattr(cut, name)) for name in ("groups", "rollouts", "nodes", "tokens", "turns")),
        *((whole.methods[name], cut.methods[name]) for name in whole.methods),
    ]:
        assert mine.keys() == other.keys()
        for name, x in mine.items():
            assert np.array_equal(x, other[name], equal_nan=getattr(x, "dtype", None) == np.float32), name
    assert json.dumps(summarize(whole)) == json.dumps(summarize(cut))
    with pytest.raises(ValueError, match="context_keys: expected for trajectories of several rows"):
        report.compute(run, ["tempo"])


def test_turns_without_their_numbers(tmp_path):
    rows = [{"group": 0, "tokens": [1, 2, 3], "response_mask": mask, "reward": 1} for mask in ([1, 0, 1], [0, 1, 1])]
    turns = report.compute(report.read(lines(tmp_path / "x.jsonl", rows)), ["grpo"]).turns
    assert turns["begin"].tolist() == [0, 2, 1] and turns["end"].tolist() == [1, 3, 3]
    assert np.isnan(turns["reward"]).all() and turns["state"].tolist() == [-1, -1, -1]
    # A rollout that only begins with tokens of the prompt is no episode.
    assert report.compute(report.read(lines(tmp_path / "y.jsonl", rows[1:])), ["grpo"]).turns is None


def test_a_row_that_is_a_turn(tmp_path):
    rows = [{"group": 0, "tokens": [1, 2], "reward": 1, "trajectory": 0, "turn": turn} for turn in (3, 4)]
    data = report.compute(report.read(lines(tmp_path / "x.jsonl", rows)), ["grpo"])
    assert data.turns["begin"].tolist() == [0, 2] and data.rollouts["length"].tolist() == [4]
    with pytest.raises(ValueError, match="trajectory: expected in every row of the file or in none"):
        report.read(lines(tmp_path / "y.jsonl", [rows[0], {**rows[1], "trajectory": None}]))


def test_answers_that_are_no_tokens(tmp_path):
    several = in_several_rows()
    for row, answers in zip(several, (["a"], ["b"], ["c"], ["d"], []), strict=True):
        row["answers"] = answers
    run = report.read(lines(tmp_path / "x.jsonl", several))
    # The rows of the first episode are 0, 2 and 3. The last row has no answer to its turn.
    assert report.compute(run, ["grpo"]).turns["answer"] == ["a", "c", "d", "b", ""]
    assert report.compute(report.read(lines(tmp_path / "y.jsonl", ROWS)), ["grpo"]).turns["answer"] == [""] * 5
    with pytest.raises(ValueError, match="answers: expected a list of texts in row 0 of"):
        report.read(lines(tmp_path / "z.jsonl", [{**ALONE, "answers": [1]}]))


def test_total_rewards(tmp_path):
    """Rewards of tokens count in the reward of an episode, as they do in its group."""
    rows = [{**row, "token_rewards": row["turn_rewards"]} for row in (EPISODE, OTHER)]
    data = report.compute(report.read(lines(tmp_path / "x.jsonl", rows)), ["grpo"])
    assert data.rollouts["reward"].tolist() == [2.5, -0.25] and data.groups["mean"].tolist() == [1.125]
    assert data.nodes["value"][data.rollouts["leaf"]].tolist() == [2.5, -0.25]
