"""Pairs from rollouts: which are chosen, and what a line holds."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokcredit.cli import main
from tokcredit.pairs import PairsSettings, run
from tokcredit.pairs.choosing import choose

RESPONSES = ["abcde", "abxyz", "abcdf", "qbcde", "abcde"]
REWARDS = [1.0, 0.0, 0.4, 0.2, 0.0]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("best_worst", [(0, 1), (2, 4)]),  # 0 and 4 are the same text
        ("closest", [(0, 2), (3, 4)]),  # each differ in one token, and 0 is taken
        ("latest", [(0, 2)]),  # "abcd" is common; the first tokens of 3 and 1 differ
    ],
)
def test_choose(how, expected):
    assert list(choose(how, REWARDS, RESPONSES, 0.0, 2))[: len(expected)] == expected
    assert next(choose(how, REWARDS, RESPONSES, 0.0, 1)) == expected[0]


def test_choose_by_gap_and_number():
    assert list(choose("closest", REWARDS, RESPONSES, 0.9, 9)) == [(0, 1)]
    assert list(choose("closest", REWARDS, RESPONSES, 1.0, 9)) == []
    everything = list(choose("best_worst", [float(i) for i in range(6)], "abcdef", 0.0, 9))
    assert everything == [(5, 0), (4, 1), (3, 2)]


def rollouts(path, prompt_tokens=((7, 8), (7, 8), (9,), (9,))):
    """A step of this trainer: a group with a pair, and one without."""
    table = pa.table(
        {
            "step": [1] * 4,
            "group": [0, 0, 1, 1],
            "prompt": ["ask", "ask", "beg", "beg"],
            "completion": ["one", "two", "one", "two"],
            "reward": [0.0, 1.0, 1.0, 1.0],
            "prompt_tokens": list(map(list, prompt_tokens)),
            "tokens": [[1, 2], [3], [1, 2], [3]],
            "response_mask": [[True, False], [True], [True, True], [True]],
        }
    )
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_of_several_files(tmp_path, capsys):
    for step in (1, 12):
        rollouts(tmp_path / f"run/rollouts-{step:06}.parquet")
    out = tmp_path / "new" / "pairs.jsonl"
    main(["pairs", str(tmp_path / "run"), "-o", str(out)])
    first, second = lines(out)
    assert (
        first
        == second
        == {
            "prompt": "ask",
            "chosen": "two",
            "rejected": "one",
            "prompt_ids": [7, 8],
            "chosen_ids": [3],
            "rejected_ids": [1, 2],
            "rejected_mask": [True, False],
        }
    )
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[1:] == [["pairs", "2"], ["groups", "4"], ["groups", "without", "2"]]
    assert [x.name for x in out.parent.iterdir()] == ["pairs.jsonl"]
    run(PairsSettings(tmp_path / "run", out, texts_only=True))
    assert lines(out)[0] == {"prompt": "ask", "chosen": "two", "rejected": "one"}


def test_rows_that_continue_different_prompts_are_no_pair(tmp_path):
    file = tmp_path / "rollouts-000001.parquet"
    rollouts(file, ((7, 8), (7, 9), (9,), (9,)))
    with pytest.raises(ValueError, match=r"path: expected a group with different responses .*, got 3 groups without"):
        run(PairsSettings(file, tmp_path / "pairs.jsonl"))
    assert [x.name for x in tmp_path.iterdir()] == [file.name]


def test_chats_and_texts_of_other_trainers(tmp_path):
    chat = [[{"role": "user", "content": "2+2="}]] * 2
    said = [[{"role": "assistant", "content": x, "thinking": None}] for x in ("4", "5")]
    table = {"step": [1, 1], "prompt": chat, "completion": said, "right": [1.0, 0.0], "advantage": [1.0, -1.0]}
    pq.write_table(pa.table(table), tmp_path / "completions_1.parquet")
    run(PairsSettings(tmp_path, tmp_path / "a.jsonl"))
    asked, good, bad = chat[0], [{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "5"}]
    assert lines(tmp_path / "a.jsonl") == [{"prompt": asked, "chosen": good, "rejected": bad}]
    verl = tmp_path / "1.jsonl"
    rows = [{"input": "q", "output": str(x), "score": float(x), "step": 1} for x in range(3)]
    verl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(PairsSettings(verl, tmp_path / "b.jsonl", choose="closest"))
    assert lines(tmp_path / "b.jsonl") == [{"prompt": "q", "chosen": "1", "rejected": "0"}]


def test_episodes_of_several_rows_are_refused(tmp_path):
    rows = [{"input": "p", "output": out, "score": 1.0, "uid": uid} for out, uid in (("a", "g_0_0"), ("b", "g_0_1"))]
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"path: expected episodes of one row, got another row of one in row 1 of"):
        run(PairsSettings(tmp_path / "1.jsonl", tmp_path / "b.jsonl"))


def test_token_ids_without_text_need_a_tokenizer(tmp_path):
    file = tmp_path / "own.jsonl"
    rows = [{"group": 0, "prompt": "q", "tokens": [i], "reward": r} for i, r in enumerate((1.0, 0.0))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"tokenizer: expected one because row 0 of .* has token ids and no text"):
        run(PairsSettings(file, tmp_path / "pairs.jsonl"))
    assert [x.name for x in tmp_path.iterdir()] == [file.name]


def test_a_chat_template_makes_chats(tmp_path):
    pytest.importorskip("transformers")
    from tokcredit.train.tiny import tokenizer

    words = tokenizer()
    words.chat_template = "{{ messages }}"
    words.save_pretrained(tmp_path / "run" / "tokenizer")
    rollouts(tmp_path / "run" / "rollouts-000001.parquet")
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"chat": {"system_prompt": "Be brief."}}))
    run(PairsSettings(tmp_path / "run", tmp_path / "pairs.jsonl"))
    (line,) = lines(tmp_path / "pairs.jsonl")
    assert line["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ask"}]
    assert line["chosen"] == [{"role": "assistant", "content": "two"}] and line["chosen_ids"] == [3]
