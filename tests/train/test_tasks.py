import itertools
import json
import re
from pathlib import Path

import pytest
import reasoning_gym
from tokcredit.train import imported, tasks
from tokcredit.train.problems import Message

SUMS = "chain_sum(min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=300)"
PRODUCTS = "products(min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=300)"


def numbers(problem):
    return tuple(sorted(re.findall(r"\d+", problem.question)))


def test_operand_pairs_are_on_one_side():
    problems = tasks.load([SUMS, PRODUCTS], 0.25)
    trained = {numbers(p) for task in problems.train for p in task}
    measured = {numbers(p) for p in problems.held_out}
    assert trained and measured and not trained & measured
    assert {p.task for p in problems.held_out} == {"chain_sum", "products"}
    assert 0.1 < len(measured) / len(trained | measured) < 0.4


def test_reasoning_gym_rewards_by_the_data_set():
    for p in tasks.load([SUMS, PRODUCTS], 0.25).held_out:
        assert p.reward(f"That makes {p.answer}.") == 1.0
        assert p.reward(f"That makes {int(p.answer) + 1}.") == 0.0
        assert p.reward("no idea") == 0.0


def test_partial_credit_of_a_data_set_is_no_credit():
    problems = tasks.load(["letter_counting(size=50)"], 0.3)
    data_set = reasoning_gym.create_dataset("letter_counting", size=50, seed=0)
    p, entry = problems.held_out[0], next(e for e in data_set if e["question"] == problems.held_out[0].question)
    wrong = str(int(p.answer) + 1)
    assert data_set.score_answer(wrong, entry) < 1 and p.reward(wrong) == 0.0
    data_set = reasoning_gym.create_dataset("spell_backward", size=50, seed=0)
    for p in tasks.load(["spell_backward(size=50, min_word_len=5)"], 0.3).held_out[:3]:
        assert p.reward(p.answer) == 1.0 and p.reward(p.answer[:-1]) == 0.0


@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>", "That makes {}.", "<answer>is {}</answer>"])
@pytest.mark.parametrize("task", ["addition(digits=2)", "basic_arithmetic(max_terms=2, size=50)"])
def test_a_number_is_judged_alike_inside_and_outside_of_tags(task, form):
    p = next(p for p in tasks.load([task], 0.3).held_out if len(p.answer) > 1 and p.answer.isdigit())
    q = next((p for p in tasks.load([task], 0.3).held_out if p.answer.startswith("-")), None)
    assert p.reward(form.format(p.answer)) == 1.0
    split = f"{p.answer[0]},{p.answer[1:]}"
    assert split.replace(",", "") == p.answer and p.reward(form.format(split)) == 0.0
    assert p.reward(form.format(f"\u2212{p.answer}")) == 0.0
    if q is not None:
        assert q.reward(form.format(q.answer.replace("-", "\u2212"))) == 1.0
        assert q.reward(form.format(q.answer[1:])) == 0.0


def test_tasks_take_turns_and_no_problem_is_skipped():
    problems = tasks.load([SUMS, PRODUCTS], 0.25)
    first = problems.step(0, 8, seed=1)
    assert [p.task for p in first] == ["chain_sum", "products"] * 4
    assert problems.step(0, 8, seed=1) == first != problems.step(0, 8, seed=2)
    assert problems.step(1, 8, seed=1) != first
    sums = len(problems.train[0])
    seen = [p for p in problems.step(0, 2 * sums, seed=1) if p.task == "chain_sum"]
    assert len({p.question for p in seen}) == len(seen) == sums


def test_addition():
    problems = tasks.load(["addition(digits=2, size=200)"], 0.2)
    for p in problems.held_out:
        a, b = map(int, re.findall(r"\d+", p.question))
        assert 10 <= a < 100 and p.reward(f"1+2+0=3>{a + b}") == 1.0 and p.reward(f"{a + b};7") == 0.0


def test_jsonl_is_checked_as_mathematics(tmp_path):
    file = tmp_path / "sums.jsonl"
    lines = [{"prompt": f"What is {i} / 2?", "answer": f"{i}/2"} for i in range(1, 40, 2)]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    problems = tasks.load([f"jsonl({str(file)!r})"], 0.3)
    assert len(problems.train[0]) + len(problems.held_out) == 20
    p = problems.held_out[0]
    value = eval(p.answer)
    assert p.task == "sums"
    assert p.reward(f"It is $\\boxed{{{value}}}$") == p.reward(f"<answer>{p.answer}</answer>") == 1.0
    assert p.reward(f"It is {value + 1}") == 0.0


def test_choices_count_in_part(tmp_path):
    file = tmp_path / "quiz.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Which {i}?", "answer": "A, C"}) + "\n" for i in range(40)))
    p = tasks.load([f"choices({str(file)!r})"], 0.3).held_out[0]
    responses = {
        "A and C": 1.0,
        "I think A cat: C.": 0.5,
        "<answer>CA</answer>": 0.0,
        "<answer>C</answer> not B": 0.5,
        "A, B, C": 0.0,
        "none": 0.0,
    }
    assert {response: p.reward(response) for response in responses} == responses


GOOD = '{"prompt": "1+1", "answer": "2"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100000, "expected JSON in {place}, got maximum recursion depth"),
        ("{", "expected JSON in {place}, got Expecting property name enclosed in double quotes at column 2"),
        ('{"prompt": "x" "answer": 1}', "expected JSON in {place}, got Expecting ',' delimiter at column 16"),
        *((line, "expected a JSON object {'prompt', 'answer'}, got '") for line in ('{"prompt": "x"}', "[]", "7")),
        ('{"prompt": "x", "answer": null}', "expected an answer that is a text or a number, got None"),
        *(
            (f'{{"prompt": "x", "answer": {answer}}}', "expected an answer that is a text or a number, got ")
            for answer in ("true", "[1]", '{"a": 1}', "NaN", "Infinity", '""', '" "')
        ),
        *(
            (f'{{"prompt": {prompt}, "answer": "2"}}', "expected a prompt that is a text, or messages")
            for prompt in (
                *("null", "7", '""', "[]", '["x"]', '[{"role": "user"}]', '[{"role": 1, "content": "x"}]'),
                *('[{"role": "user", "content": null}]', '[{"role": "user", "content": [{"type": "image"}]}]'),
                '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]',
                '[{"role": "user", "content": "x", "tool_calls": []}]',
            )
        ),
    ],
)
@pytest.mark.parametrize("task", ["jsonl", "choices"])
def test_a_malformed_line_is_named(tmp_path, task, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(GOOD.replace("2", "B") + "\n\n" + line + "\n")
    with pytest.raises(ValueError) as caught:
        tasks.load([f"{task}({str(file)!r})"], 0.3)
    place = "" if "{place}" in message else f"{file}:3: "
    assert str(caught.value).startswith(f"tasks: {place}{message.replace('{place}', f'{file}:3')}")


def test_an_answer_of_choices_has_letters(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(GOOD + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: expected an answer of capital letters, got '2'"):
        tasks.load([f"choices({str(file)!r})"], 0.3)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    file = tmp_path / "bad.jsonl"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tasks: expected a JSONL file in UTF-8, got '.*bad\.jsonl'"):
        tasks.load([f"jsonl({str(file)!r})"], 0.3)


SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    """Also where the character stands in the file itself and not as an escape; JSON allows that above U+001F."""
    file = tmp_path / "lines.jsonl"
    texts = [f"Count to {i},{separator}then stop" for i in range(40)]
    escaped = ord(separator) < 0x20
    lines = [json.dumps({"prompt": text, "answer": i}, ensure_ascii=escaped) for i, text in enumerate(texts)]
    assert escaped or separator in lines[0]
    file.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    problems = tasks.load([f"jsonl({str(file)!r})"], 0.3)
    assert sorted(p.question for p in [*problems.train[0], *problems.held_out]) == sorted(texts)


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "marked.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": i}) + "\n" for i in range(40)), "utf-8-sig")
    problems = tasks.load([f"jsonl({str(file)!r})"], 0.3)
    assert {p.answer for p in [*problems.train[0], *problems.held_out]} == set(map(str, range(40)))


def test_no_reader_of_the_trainer_splits_lines_at_other_characters():
    folder = Path(tasks.__file__).parent
    for path in [*folder.glob("*.py"), *(folder.parent / "analyze").glob("*.py")]:
        assert ".splitlines(" not in path.read_text(), path


@pytest.mark.parametrize(
    "prompt", ["In 2 steps: what is the colour of {}?", "Is {} prime? Answer 1 for yes, 0 for no."]
)
def test_prompts_that_hold_the_same_numbers_are_split_by_their_text(tmp_path, prompt):
    file = tmp_path / "colours.jsonl"
    names = ["".join(letters) for letters in itertools.product("abcdef", repeat=2)]
    file.write_text("".join(json.dumps({"prompt": prompt.format(n), "answer": "7"}) + "\n" for n in names))
    problems = tasks.load([f"jsonl({str(file)!r})"], 0.3)
    assert len(problems.train[0]) + len(problems.held_out) == len(names)
    assert 0 < len(problems.held_out) < len(names)


def test_a_file_of_one_prompt_cannot_be_split(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text(GOOD)
    with pytest.raises(ValueError, match=r"tasks: expected at least two different problems of jsonl\(.*, got 1"):
        tasks.load([f"jsonl({str(file)!r})"], 0.3)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]},
]


def test_chat_messages_are_messages(tmp_path):
    file = tmp_path / "chat.jsonl"
    chats = [
        [CHAT[0], CHAT[1], {"role": "assistant", "content": str(i)}, {"role": "user", "content": "?"}]
        for i in range(40)
    ]
    alone = [[{"role": "user", "content": f"Say {i}."}] for i in range(40)]
    file.write_text("".join(json.dumps({"prompt": chat, "answer": 2}) + "\n" for chat in [*chats, *alone]))
    problems = tasks.load([f"jsonl({str(file)!r})"], 0.3)
    found = {p.question: p for p in [*problems.train[0], *problems.held_out]}
    assert len(found) == 80
    p = found["system: Be brief.\n\nuser: What is 1+1?\n\nassistant: 5\n\nuser: ?"]
    roles = ("system", "user", "assistant", "user")
    assert p.messages == tuple(map(Message, roles, ("Be brief.", "What is 1+1?", "5", "?")))
    assert found["Say 5."].messages == (Message("user", "Say 5."),)
    assert p.again("4", "Once more.").messages == (
        *p.messages,
        Message("assistant", "4"),
        Message("user", "Once more."),
    )
    assert p._replace(messages=()).again("4", "Once more.").messages == ()


def shortest(prompt, response, answer):
    return -len(response) + len(prompt) * 0.0 + (response == answer)


def test_another_reward():
    problems = tasks.load(["addition(digits=1)"], 0.2, reward="test_tasks:shortest")
    p = problems.held_out[0]
    assert p.reward("abc") == -3
    assert p.reward(p.answer) == 1.0 - len(p.answer)


@pytest.mark.parametrize(
    ("chosen", "share", "message"),
    [
        (
            ["no_such_data"],
            0.2,
            "tasks: expected jsonl, choices, addition, sums, letters, calculator, minigrid, textarena, environment or "
            "a reasoning_gym data set, got 'no_such_data'",
        ),
        (["products(digits=1)"], 0.2, "tasks: products: expected settings among min_terms, .*, got digits"),
        (["products(min_terms=0)"], 0.2, "tasks: products: expected .*, got .*min_terms=0: min_terms must be positive"),
        ([], 0.2, "tasks: expected at least one, because the model has no default"),
        (["addition(digits=0)"], 0.2, "digits: expected a whole number at least 1, got 0"),
        (["calculator(operations=-1)"], 0.2, "operations: expected a whole number at least 1, got -1"),
        (["addition(size=1)"], 0.2, "tasks: expected at least two different problems of addition.size=1., got 1"),
        (["addition"], 0.0, "held_out: expected a share that leaves problems on both sides, got 0.0"),
        (["addition"], 1.0, "held_out: expected a share"),
        (["jsonl"], 0.2, "tasks: jsonl: expected a value for path, got none"),
        (
            ["addition(digit=2)"],
            0.2,
            r"tasks: addition: expected settings among digits, size, seed, got digit; did you mean digits\?",
        ),
        (
            ["chain_sum(min_term=2)"],
            0.2,
            r"tasks: chain_sum: expected .*, size, got min_term; did you mean min_terms\?",
        ),
        (["a/b.jsonl"], 0.2, r"^tasks: expected a path in quotes, jsonl\('a/b.jsonl'\), got a/b.jsonl$"),
        (
            ["choices(a.jsonl)"],
            0.2,
            r"^tasks: expected a path in quotes, choices\('a.jsonl'\), got choices",
        ),
        (["adition"], 0.2, r"got 'adition'; did you mean addition\?"),
    ],
)
def test_bad_tasks(chosen, share, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(chosen, share)


def test_a_reward_path_needs_a_colon():
    with pytest.raises(ValueError, match=r"reward: expected package\.module:function, got 'shortest'"):
        tasks.load(["addition"], 0.2, reward="shortest")
    with pytest.raises(ValueError, match="reward: expected a function in test_tasks, got 'longest'"):
        tasks.load(["addition"], 0.2, reward="test_tasks:longest")


def test_modules_of_rewards(tmp_path, monkeypatch):
    """A module that is missing is named with the option; what it imports itself keeps its own traceback."""
    (tmp_path / "inner_import.py").write_text("import nowhere_else")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("nowhere:function", "nowhere.inner:function"):
        with pytest.raises(ValueError, match="reward: expected a module that can be imported, got 'nowhere"):
            tasks.load(["addition"], 0.2, reward=path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_else"):
        tasks.load(["addition"], 0.2, reward="inner_import:function")


@pytest.mark.parametrize("text", ['"\\ud800"', '[{"role": "user", "content": "a\\udfff"}]'])
def test_lone_surrogates_are_named_before_they_reach_a_tokenizer(tmp_path, text):
    file = tmp_path / "bad.jsonl"
    for line in (f'{{"prompt": {text}, "answer": "2"}}', f'{{"prompt": "x", "answer": "2", "answer": {text}}}'):
        file.write_text(GOOD + "\n" + line + "\n")
        with pytest.raises(ValueError, match=r"bad\.jsonl:2: expected texts without lone surrogates"):
            tasks.load([f"jsonl({str(file)!r})"], 0.3)
    file.write_text(GOOD + '\n{"prompt": "\\ud83d\\ude00?", "answer": "2"}\n')
    found = tasks.load([f"jsonl({str(file)!r})"], 0.5)
    assert "\U0001f600?" in {p.question for p in (*found.held_out, *found.train[0])}


def of_trl(completions, **columns):
    return [0.0 for _ in completions]


def of_trl_by_position(prompts, completions, answer):
    return [0.0]


def of_verl(data_source, solution_str, ground_truth, extra_info=None):
    return 0.0


def of_two(prompt, reply):
    return 0.0


def of_keywords(*, prompt, reply, answer):
    return 0.0


async def of_later(prompt, reply, answer):
    return 0.0


class Of:
    def __init__(self, prompt, reply, answer):
        pass

    def method(self, prompt, reply, answer, weight=1.0):
        return 0.5


method = Of("", "", "").method


def of_any(*given):
    return 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("of_trl", r"got test_tasks:of_trl\(completions, \*\*columns\), which is that of TRL"),
        ("of_trl_by_position", "which is that of TRL; write one that calls it"),
        ("of_verl", "which is that of verl"),
        ("of_two", r"got test_tasks:of_two\(prompt, reply\): too many positional arguments"),
        ("of_keywords", "too many positional arguments"),
        ("of_later", "in test_tasks, got an async function"),
        ("Of", "in test_tasks, got a class"),
        ("itertools", "in test_tasks, got 'itertools'"),
    ],
)
@pytest.mark.parametrize("setting", ["reward", "verifier"])
def test_the_arguments_of_a_function_are_checked_before_it_is_called(setting, name, message):
    with pytest.raises(ValueError, match=f"^{setting}: expected a function .*{message}"):
        imported.function(f"test_tasks:{name}", setting, ("prompt", "reply", "answer"))


@pytest.mark.parametrize("name", ["shortest", "method", "of_any", "max"])
def test_functions_that_take_the_arguments(name):
    path = "builtins:max" if name == "max" else f"test_tasks:{name}"
    assert callable(imported.function(path, "reward", ("prompt", "reply", "answer")))
