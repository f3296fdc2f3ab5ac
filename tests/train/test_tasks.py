import json
import re

import pytest
from tokcredit.train import tasks

SUMS = "chain_sum(min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=300)"
PRODUCTS = "products(min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=300)"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 12.", "12"),
        ("3 + 4 = 7", "7"),
        ("It is -4", "-4"),
        ("9-4", "4"),
        ("(2)-3", "3"),
        ("1,234.50", "1234.50"),
        ("<answer> 5 </answer> and 6", "5"),
        ("none", None),
    ],
)
def test_final_answer(response, answer):
    assert tasks.final_answer(response, numeric=True) == answer


def test_final_answer_of_words_is_the_reply():
    assert tasks.final_answer(" yes \n", numeric=False) == "yes"


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
    problems = tasks.load(["basic_arithmetic(max_terms=2, size=50)"], 0.3)
    p = next(p for p in problems.held_out if len(p.answer) > 1)
    assert p.reward(f"<answer>is {p.answer}</answer>") == 0.0
    assert p.reward(f"<answer>{p.answer}</answer>") == 1.0


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


@pytest.mark.parametrize("line", ["{", '{"prompt": "x"}', "[]"])
def test_a_malformed_line_is_named(tmp_path, line):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "1+1", "answer": "2"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"tasks: .*bad\.jsonl:2: expected"):
        tasks.load([f"jsonl({str(file)!r})"], 0.3)


def shortest(prompt, response, answer):
    return -len(response) + len(prompt) * 0.0 + (response == answer)


def test_another_reward():
    problems = tasks.load(["addition(digits=1)"], 0.2, reward="test_tasks:shortest")
    p = problems.held_out[0]
    assert p.reward("abc") == -3.0
    assert p.reward(p.answer) == 1.0 - len(p.answer)


@pytest.mark.parametrize(
    ("chosen", "share", "message"),
    [
        (
            ["no_such_data"],
            0.2,
            "tasks: expected jsonl, choices, addition, calculator or a reasoning_gym data set, got 'no_such_data'",
        ),
        (["products(digits=1)"], 0.2, "tasks: products: .*digits"),
        (["products(min_terms=0)"], 0.2, "tasks: products: min_terms"),
        (["addition"], 0.0, "held_out: expected a share that leaves problems on both sides, got 0.0"),
        (["addition"], 1.0, "held_out: expected a share"),
        ([], 0.2, "held_out: expected a share"),
    ],
)
def test_bad_tasks(chosen, share, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(chosen, share)


def test_a_reward_path_needs_a_colon():
    with pytest.raises(ValueError, match=r"reward: expected package\.module:function, got 'shortest'"):
        tasks.load(["addition"], 0.2, reward="shortest")
