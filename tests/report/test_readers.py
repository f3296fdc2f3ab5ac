"""Files of trainers: what they hold is read as it is, and what is malformed is refused by name."""

import json
import math
import re
from pathlib import Path

import derivations
import numpy as np
import pytest
import tokcredit as tc
from hypothesis import given, strategies
from tokcredit import report
from tokcredit.report.vocabulary import load_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("transformers")

FILES = Path(__file__).parent / "files"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    derivations.write(path, groups=3, rollouts=6, length=60)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return str(folder / "tokenizer")


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_reads_what_the_trainer_wrote(folder):
    rows = pq.read_table(folder / "rollouts-000010.parquet").to_pylist()
    run = report.read(folder)
    batch = run.batch
    assert run.step == 10 and run.settings["method"] == "tempo" and run.name.endswith("/rollouts-000010.parquet")
    assert batch.num_rows == 18 and batch.num_groups == 3
    for r, row in enumerate(rows):
        span = slice(int(batch.begin[r]), int(batch.end[r]))
        assert batch.tokens[span].tolist() == row["tokens"]
        assert batch.rewards[r].item() == row["reward"]
        assert run.prompts[int(batch.group_index[r])] == row["prompt"]
        for name, x in [
            ("old_log_probs", batch.old_log_probs),
            ("log_probs", run.log_probs),
            ("advantages", run.advantages),
        ]:
            assert x[span].tolist() == row[name], name
        assert "".join(run.vocabulary.texts(row["tokens"][:-1])) == row["completion"]


def test_a_row_for_which_the_trainer_computed_no_log_probs(folder, tmp_path):
    """It writes null there, and the log-probs of the other rows alone say nothing about clipping."""
    table = pq.read_table(folder / "rollouts-000010.parquet")
    column = table.column_names.index("log_probs")
    some = pa.array([None, *table["log_probs"].to_pylist()[1:]], table.schema.field(column).type)
    pq.write_table(table.set_column(column, "log_probs", some), tmp_path / "rollouts-000010.parquet")
    run = report.read(tmp_path)
    assert run.log_probs is None and run.advantages is not None


def test_the_last_step_or_the_one_asked_for(tmp_path):
    for step in (9, 10):
        derivations.write(tmp_path, step=step, groups=1, rollouts=2, length=40, seed=step)
    assert report.read(tmp_path).step == 10
    assert report.read(tmp_path, step=9).prompts != report.read(tmp_path).prompts
    with pytest.raises(ValueError, match=r"step: expected one of 9, 10, got 8"):
        report.read(tmp_path, step=8)


def texts(run):
    """The tokens of each row that the policy chose, as text."""
    batch = run.batch
    rows = [slice(int(a), int(b)) for a, b in zip(batch.begin, batch.end, strict=True)]
    return ["".join(run.vocabulary.texts(batch.tokens[r][batch.response_mask[r]].tolist())) for r in rows]


# -- files of TRL and verl, written by their own trainers (tests/adapters/completions.py, dumps.py) ------------------


def test_trl_columns_of_log_extra_are_no_rewards(tokenizer):
    """Beside the reward there are a column of floats, one named tokens, and one of text.

    Two groups that are no neighbours have the same prompt.
    """
    file = FILES / "trl-text.parquet"
    rows = pq.read_table(file).to_pylist()
    run = report.read(file, tokenizer, rewards={"right": 1.0})
    assert (
        run.step == 1
        and run.batch.num_rows == len(rows) == 16
        and run.batch.num_groups == 4 == len(set(run.prompts)) + 1
    )
    assert run.batch.rewards.tolist() == [row["right"] for row in rows]
    assert run.batch.group_index.tolist() == [row // 4 for row in range(16)]
    assert texts(run) == [row["completion"] for row in rows]
    message = r"rewards: expected a weight .* right, confidence of .*; for example --rewards right 1"
    with pytest.raises(ValueError, match=message):
        report.read(file, tokenizer)


def test_trl_one_reward_function_needs_no_name(tokenizer, tmp_path):
    table = pq.read_table(FILES / "trl-text.parquet").drop_columns(["confidence"])
    pq.write_table(table, tmp_path / "completions_00001.parquet")
    run = report.read(tmp_path, tokenizer)
    assert run.batch.rewards.tolist() == table["right"].to_pylist()


def test_trl_chat_messages(tokenizer):
    """Roles are no tokens, a function may be named as our column, and a weighted sum leaves out what was not scored."""
    file = FILES / "trl-chat.parquet"
    rows = pq.read_table(file).to_pylist()
    run = report.read(file, tokenizer, rewards={"right": 2.0, "reward": -1.0})
    assert run.prompts[0] == "user: " + rows[0]["prompt"][0]["content"]
    assert texts(run) == [row["completion"][0]["content"] for row in rows]
    assert run.batch.num_tokens == int(run.batch.response_mask.sum())
    assert run.batch.rewards.tolist() == [2 * row["right"] - (row["reward"] or 0) for row in rows]
    assert any(row["reward"] is None for row in rows)


def test_a_row_that_no_function_scored_does_not_count(tokenizer):
    file = FILES / "trl-chat.parquet"
    scored = [row["reward"] is not None for row in pq.read_table(file).to_pylist()]
    run = report.read(file, tokenizer, rewards={"reward": 1.0})
    assert (run.batch.lengths > 0).tolist() == scored and not all(scored)
    table = report.compute(run, ["grpo"])
    for group in range(4):
        rows = table.rollouts["group"] == group
        kept = table.rollouts["reward"][rows & np.array(scored)]
        assert table.groups["mean"][group] == pytest.approx(kept.mean())


def test_verl_uid_is_the_group(tokenizer):
    """All prompts have the same text, and verl's padding row is no rollout."""
    file = FILES / "verl-v1.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({record["input"] for record in records[:-1]}) == 1 and records[-1]["uid"].startswith("pad")
    run = report.read(file, tokenizer)
    assert run.step == 3 and run.batch.group_index.tolist() == [0] * 4 + [1] * 3 + [2] * 4 + [3] * 4
    assert run.batch.rewards.tolist() == [record["score"] for record in records[:-1]]
    assert texts(run) == [record["output"] for record in records[:-1]]


def test_verl_numbers_written_as_text(tokenizer, tmp_path):
    file = FILES / "verl-v0.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert {type(record["acc"]) for record in records} == {str}
    run = report.read(file, tokenizer, rewards={"acc": 1.0})
    expected = [record["score"] for record in records]
    assert run.batch.rewards.tolist() == expected == report.read(file, tokenizer).batch.rewards.tolist()
    assert run.batch.num_groups == 1
    as_text = lines(tmp_path / "3.jsonl", [{**record, "score": str(record["score"])} for record in records])
    assert report.read(as_text, tokenizer).batch.rewards.tolist() == expected


def test_verl_outputs_of_one_session_are_turns(tokenizer, tmp_path):
    uids = ("a_0_0", "a_1_0", "a_0_1", "b_0_0")
    records = [{"input": "1", "output": "22", "score": 1.0, "uid": uid} for uid in uids]
    batch = report.read(lines(tmp_path / "1.jsonl", records), tokenizer).batch
    assert batch.trajectory_ids.tolist() == [0, 1, 0, 2] and batch.group_ids.tolist() == [0, 0, 0, 1]
    assert batch.whole.turns.counts.tolist() == [2, 1, 1]
    differ = [records[0], {**records[2], "score": 0.0}]
    with pytest.raises(ValueError, match="rewards: expected"):
        report.read(lines(tmp_path / "2.jsonl", differ), tokenizer)


# -- responses -----------------------------------------------------------------------------------------------------


def test_conversations_with_tools(tokenizer, tmp_path):
    """What a tool says is no token of the policy; a call is, with the arguments that it has."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    said = [
        {"role": "assistant", "content": "So 2", "tool_calls": [call]},
        {"role": "tool", "content": "is 11"},
        {"role": "assistant", "content": [{"type": "text", "text": "First, "}, {"type": "text", "text": "4"}]},
    ]
    for name in ("x.jsonl", "x.parquet"):
        records = [{"prompt": "p", "completion": said, "reward": 1.0}]
        if name.endswith("jsonl"):
            lines(tmp_path / name, records)
        else:
            # An Arrow column holds one type: all contents are lists of parts.
            parts = [
                {**m, "content": m["content"] if isinstance(m["content"], list) else [{"text": m["content"]}]}
                for m in said
            ]
            pq.write_table(pa.Table.from_pylist([{**records[0], "completion": parts}]), tmp_path / name)
        run = report.read(tmp_path / name, tokenizer)
        assert texts(run) == ['So 2{"name": "add", "arguments": {"a": 1}}First, 4']
        hidden = run.batch.tokens[~run.batch.response_mask].tolist()
        assert "".join(run.vocabulary.texts(hidden)) == "is 11"


@pytest.mark.parametrize("field", ["text", "completion", "output"])
@pytest.mark.parametrize("chat", [False, True])
def test_lone_surrogates_in_responses_are_refused(tokenizer, tmp_path, field, chat):
    said = [{"role": "assistant", "content": "ab\ud83d"}] if chat else "ab\ud83d"
    record = {"prompt": "p", "input": "p", field: said, "reward": 1.0, "score": 1.0}
    with pytest.raises(
        ValueError, match=rf"{field}: expected text that UTF-8 can encode in row 0 of .*U\+D83D at character 2"
    ):
        report.read(lines(tmp_path / "x.jsonl", [record]), tokenizer)


def test_bytes_that_are_not_utf8(tokenizer, tmp_path):
    """They are shown in a prompt, and refused in a response, which would have other tokens."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9 \\ud800", "tokens": [5], "reward": 1}\n')
    assert report.read(path).prompts == ["caf\udce9 \ud800"]
    pytest.importorskip("jinja2")
    from tokcredit.report.page import render

    page = render(report.compute(report.read(path), ["grpo"]))
    assert r"caf\\u{dce9} \\u{d800}" in page and page.encode()
    path.write_bytes(b'{"prompt": "p", "text": "caf\xe9", "reward": 1}\n')
    with pytest.raises(ValueError, match=r"text: expected .* U\+DCE9 at character 3"):
        report.read(path, tokenizer)


def test_ids_above_the_length_of_the_tokenizer_have_texts(tmp_path):
    """A vocabulary with gaps, as reserved ids leave them, and an added token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 90}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    words = load_tokenizer(str(tmp_path / "tokenizer"))
    end = words.eos_token_id
    assert len(words) < 90
    run = report.read(lines(tmp_path / "x.jsonl", [{"prompt": "p", "tokens": [1, 90, end, 50, 91], "reward": 1}]))
    assert run.vocabulary.texts(run.batch.tokens.tolist()) == ["a", "b", "<end>", "⟨50⟩", "⟨91⟩"]


# -- JSONL and Parquet of any origin -------------------------------------------------------------------------------

PLAIN = [
    {
        "group": "b",
        "prompt": "p",
        "tokens": [1, 2, 3],
        "reward": 1,
        "log_probs": [-1, None, -0.5],
        "response_mask": [True, False, True],
    },
    {"group": "a", "prompt": "q", "tokens": [], "reward": 0, "log_probs": [], "response_mask": []},
    {
        "group": "b",
        "prompt": "p",
        "tokens": [1, 4],
        "reward": 0,
        "log_probs": [-1, -2],
        "response_mask": [True, True],
    },
]


def written(folder, records, kind):
    """A file of records."""
    if kind == "jsonl":
        return lines(folder / "x.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_plain_records(tmp_path, kind):
    run = report.read(written(tmp_path, PLAIN, kind))
    assert run.batch.group_index.tolist() == [0, 1, 0] and run.prompts == ["p", "q"]
    assert run.log_probs is None and run.batch.old_log_probs[[0, 2]].tolist() == [-1, -0.5]
    assert run.batch.response_mask.tolist() == [True, False, True, True, True]
    assert run.vocabulary.texts([1]) == ["⟨1⟩"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_numbers_in_other_notations(tmp_path, kind):
    """6.0 is the token 6, 0 and 1 are flags, and a whole number is a log-prob."""
    record = {"prompt": "p", "tokens": [6.0, 7.0], "reward": 1, "response_mask": [0, 1], "log_probs": [-1, -2]}
    batch = report.read(written(tmp_path, [record], kind)).batch
    assert batch.tokens.tolist() == [6, 7] and batch.response_mask.tolist() == [False, True]
    assert batch.old_log_probs.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([{"group": 1}, {"group": None}, {"group": 1}, {"group": None}], [0, 1, 0, 2]),
        ([{"group": 1.0}, {"group": math.nan}, {"group": 1.0}, {"group": math.nan}], [0, 1, 0, 2]),
        ([{"prompt": "p"}, {"prompt": "q"}, {"prompt": "p"}, {"prompt": ""}], [0, 1, 0, 2]),
        ([{"prompt": "p", "group": None}, {"prompt": "p", "group": None}], [0, 1]),
    ],
)
def test_rows_without_a_group_are_strangers(tmp_path, kind, groups, expected):
    records = [{"tokens": [1], "reward": 1.0, **group} for group in groups]
    assert report.read(written(tmp_path, records, kind)).batch.group_index.tolist() == expected


def test_weights_of_columns_of_any_file(tmp_path):
    records = [{"prompt": "p", "tokens": [1], "form": x, "right": y} for x, y in ((1, 0.5), (0, None), (None, None))]
    batch = report.read(lines(tmp_path / "x.jsonl", records), rewards={"form": 2.0, "right": 1.0}).batch
    assert batch.rewards.tolist() == [2.5, 0.0, 0.0] and batch.response_mask.tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"rihgt: expected in row 0 of .*, got prompt, tokens, form, right"):
        report.read(tmp_path / "x.jsonl", rewards={"rihgt": 1.0})


ROW = {"prompt": "p", "tokens": [1, 2], "reward": 1.0}
NUMBER, TOKENS, FLAGS = "expected a number", "tokens: expected whole numbers", "expected values true or false"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": [6.5, 2]}, rf"{TOKENS} in row 1 of .*, got 6\.5"),
        ({"tokens": [6, None]}, rf"{TOKENS} in row 1 of .*, got (None|nan)"),
        ({"tokens": ["6", "2"]}, rf"{TOKENS} in row 1 of .*, got '6'"),
        ({"tokens": [True, False]}, rf"{TOKENS} in row 1 of .*, got True"),
        ({"tokens": [[1], [2]]}, rf"{TOKENS} in row 1 of .*, got \[1\]"),
        ({"tokens": [1e30, 1]}, rf"{TOKENS} in row 1 of .*, got 1e\+30"),
        ({"tokens": "12"}, rf"{TOKENS} in row 1 of .*, got '12'"),
        ({"tokens": 12}, rf"{TOKENS} in row 1 of .*, got 12"),
        ({"tokens": None}, "tokens or text: expected one of them in row 1 of .*, got neither"),
        ({"tokens": None, "text": 5}, "text: expected text or chat messages in row 1 of .*, got 5"),
        ({"tokens": None, "text": ["a"]}, "text: expected text or chat messages in row 1 of .*, got "),
        ({"tokens": None, "text": [{"content": "a"}]}, "text: expected text or chat messages in row 1 of .*, got "),
        ({"reward": None}, "reward: expected a finite number in row 1 of .*, got None"),
        ({"reward": "1.0"}, rf"reward: {NUMBER} in row 1 of .*, got '1\.0'"),
        ({"reward": True}, rf"reward: {NUMBER} in row 1 of .*, got True"),
        ({"reward": [1.0]}, rf"reward: {NUMBER} in row 1 of .*, got \[1\.0\]"),
        ({"reward": math.inf}, "reward: expected a finite number in row 1 of .*, got inf"),
        ({"prompt": None}, "group or prompt: expected one of them in row 1 of .*, got neither"),
        ({"step": 2.5}, r"step: expected a whole number in row 1 of .*, got 2\.5"),
        ({"step": "2"}, "step: expected a whole number in row 1 of .*, got '2'"),
        ({"step": None}, "step: expected a whole number in row 1 of .*, got None"),
        ({"response_mask": [0.5, 1]}, rf"response_mask: {FLAGS} in row 1 of .*, got 0\.5"),
        ({"response_mask": [2, 1]}, rf"response_mask: {FLAGS} in row 1 of .*, got 2"),
        ({"response_mask": [True, None]}, rf"response_mask: {FLAGS} in row 1 of .*, got None"),
        ({"response_mask": None}, "response_mask: expected in every row of the file or in none, got none in row 1 of"),
        ({"response_mask": [True]}, "response_mask: expected 2 values in row 1 of .*, got 1"),
        ({"log_probs": ["-1", "-2"]}, "log_probs: expected numbers in row 1 of .*, got '-1'"),
        ({"log_probs": [True, False]}, "log_probs: expected numbers in row 1 of .*, got True"),
        ({"log_probs": [-1e300, -1.0]}, r"log_probs: expected numbers in row 1 of .*, got -1e\+300"),
        ({"log_probs": [-1.0]}, "log_probs: expected 2 values in row 1 of .*, got 1"),
        ({"advantages": ["1", "2"]}, "advantages: expected numbers in row 1 of .*, got '1'"),
        ({"entropies": [[0.1], [0.2]]}, r"entropies: expected numbers in row 1 of .*, got \[0\.1\]"),
        ({"entropies": None}, "entropies: expected in every row of the file or in none, got none in row 1 of"),
        ({"truncated": 0.5}, r"truncated: expected true or false in row 1 of .*, got 0\.5"),
        ({"truncated": "no"}, "truncated: expected true or false in row 1 of .*, got 'no'"),
        ({"node_ids": 1.5}, r"node_ids: expected a whole number in row 1 of .*, got 1\.5"),
    ],
)
def test_wrong_values_are_refused(tmp_path, tokenizer, kind, wrong, message):
    right = {
        "response_mask": [True, True],
        "log_probs": [-1.0, -2.0],
        "advantages": [1.0, 1.0],
        "entropies": [0.1, 0.2],
        "truncated": True,
        "node_ids": 1,
        "step": 2,
        "text": "a",
    }
    first = {name: right[name] for name in wrong.keys() & right.keys()}
    if kind == "parquet":  # a column has one type
        first, message = {**first, **{k: x for k, x in wrong.items() if x is not None}}, message.replace("1", "[01]", 1)
    records = [{**ROW, **first}, {**ROW, **wrong}]
    with pytest.raises(ValueError, match=message):
        report.read(written(tmp_path, records, kind), tokenizer)


def test_tokens_beyond_int64(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{**ROW, "tokens": [2**63, 1]}])
    tokens = pa.array([[2**63, 1]], pa.list_(pa.uint64()))
    pq.write_table(pa.table({"tokens": tokens, "prompt": ["p"], "reward": [1.0]}), tmp_path / "x.parquet")
    for file in (path, tmp_path / "x.parquet"):
        with pytest.raises(ValueError, match=f"tokens: expected whole numbers in row 0 of .*, got {2**63}"):
            report.read(file)


@pytest.mark.parametrize(
    "name", sorted(n for n in tc.inputs.names() - tc.inputs.names("host") if not tc.inputs.get(n).axes)
)
def test_text_is_no_input(tmp_path, name):
    """Every registered input is checked."""
    per_token = tc.inputs.get(name).per == "token"
    path = lines(tmp_path / "x.jsonl", [{**ROW, name: ["a", "b"] if per_token else "a"}])
    with pytest.raises(ValueError, match=f"{name}: expected .* in row 0 of .*, got 'a'"):
        report.read(path)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"group": 0, "text": "a", "reward": 1}], r"tokenizer: expected one because .* holds text .*, got None"),
        ([{"group": 0, "tokens": [1]}], "reward: expected in row 0 of .*, got group, tokens"),
        ([{"tokens": [1], "reward": 1}], "group or prompt: expected one of them in row 0 of .*, got neither"),
        ([{"output": "a", "score": 1}], "group or prompt: expected one of them in row 0 of .*, got neither"),
        (
            [{"prompt": None, "completion": "a", "right": 1.0, "advantage": 0.0}],
            "group or prompt: expected one of them in row 0 of .*, got neither",
        ),
        (
            [{"prompt": "p", "completion": "a", "right": None, "length": 3, "advantage": 0.0}],
            "rewards: expected a column of floats between completion and advantage in .*, got none",
        ),
        ([[1]], "path: expected an object in line 1 of .*, got list"),
        ([], "path: expected rollouts in .*, got an empty file"),
    ],
)
def test_refused(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        report.read(lines(tmp_path / "x.jsonl", records))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"{", "path: expected JSON in line 1 of"),
        ("x.jsonl", b"[" * 100000, "path: expected JSON in line 1 of"),
        ("x.parquet", b"PAR1", "path: expected a Parquet file, got"),
        ("settings.json", b"[1]", "path: expected an object in .*settings.json, got list"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    lines(tmp_path / "1.jsonl", [{**ROW, "step": 1}])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        report.read(tmp_path / ("1.jsonl" if name == "settings.json" else name))


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="got nothing in"):
        report.read(tmp_path)


VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.sampled_from(["", "a", "1.0", "\ud800", "p_0_0", "assistant", 10**400]),
    lambda x: (
        strategies.lists(x, max_size=3)
        | strategies.dictionaries(strategies.sampled_from(["role", "content", "text", "tool_calls", "function"]), x)
    ),
    max_leaves=6,
)
GOOD = {
    "prompt": "p",
    "input": "p",
    "tokens": [1, 2],
    "text": "a",
    "completion": [{"role": "assistant", "content": "a"}],
    "output": "a",
    "reward": 1.0,
    "score": 1.0,
    "advantage": 0.5,
    "group": 1,
    "uid": "p_0_0",
    "step": 1,
    "response_mask": [True, True],
    "log_probs": [-1.0, -1.0],
    "entropies": [0.1, 0.2],
    "truncated": False,
}


@strategies.composite
def spoiled(draw):
    """Rows of verl, of TRL or plain ones, that are right but for a few values and a few columns."""
    rows = [{**GOOD, "uid": f"p_{session}_0"} for session in range(draw(strategies.integers(1, 3)))]
    trainer = draw(strategies.sampled_from([set(), {"output", "score"}, {"output", "score", "advantage"}]))
    for name in trainer | draw(strategies.sets(strategies.sampled_from([*GOOD]), max_size=5)):
        for row in rows:
            del row[name]
    for row in rows:
        row.update(draw(strategies.dictionaries(strategies.sampled_from([*GOOD]), VALUES, max_size=2)))
    return rows


@given(spoiled())
def test_anything_is_read_or_refused(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "anything.jsonl"
    tokenizer = path.parent / "words"
    if not tokenizer.exists():
        derivations.tokenizer(["ab"]).save_pretrained(tokenizer)
    try:
        run = report.read(lines(path, records), str(tokenizer))
    except ValueError as error:
        assert re.match(r"[\w ]+: expected .*, got ", str(error), re.DOTALL), error
    else:
        assert 1 <= run.batch.num_rows <= len(records) and run.batch.num_groups <= run.batch.num_rows
