import itertools
import random
import re
import string
from fractions import Fraction

import numpy as np
import pytest
from tokcredit.rewards import matching
from tokcredit.rewards.answers import tagged
from tokcredit.rewards.matching import Call
from tokcredit.train import tasks, tiny, tools


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool>add(12,34)</tool>", [Call("add", {"a": 12, "b": 34})]),
        ("so <tool> mul( b = -2 , a=0.5 ) </tool>", [Call("mul", {"a": Fraction(1, 2), "b": -2})]),
        ("<tool>add(1,2)</tool><tool>sub(3,4)</tool>", [Call("add", {"a": 1, "b": 2}), Call("sub", {"a": 3, "b": 4})]),
        ("<tool>pow(2)</tool>", [Call("pow", {"a": 2})]),
        ("<tool>add()</tool>", [Call("add", {})]),
        ("<tool>add(x=1,y=2)</tool>", [Call("add", {"x": 1, "y": 2})]),
        ("<tool>oops<tool>add(1,2)</tool>", [Call("add", {"a": 1, "b": 2})]),
        ("<tool>add(1,2", []),
        ("add(1,2)", []),
        ("add(1,2)</tool>", [Call("", None)]),
        ("<tool>1+2</tool>", [Call("", None)]),
        ("<tool>add(1,2,3)</tool>", [Call("add", None)]),
        ("<tool>add(1,a=2)</tool>", [Call("add", None)]),
        ("<tool>add(1,,2)</tool>", [Call("add", None)]),
        ("<tool>add(__import__('os'),2)</tool>", [Call("add", None)]),
        ("<tool>add(1,9999999999999999)</tool>", [Call("add", None)]),
        ("<tool>add(1,\u0661)</tool>", [Call("add", None)]),
    ],
)
def test_calls(text, expected):
    assert tools.calls(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("add(12,34)", "46"),
        ("sub(3,5)", "-2"),
        ("mul(0.5,4)", "2"),
        ("div(1,3)", "0.333333"),
        ("div(b=4,a=2)", "0.5"),
        ("mul(999999999999999,999999999999999)", str(999999999999999**2)),
        ("div(7,0)", "error: division by zero"),
        ("pow(2,3)", "error: no such tool"),
        ("add(1)", "error: expected two numbers"),
        ("add(x=1,y=2)", "error: expected two numbers"),
        ("add(1,two)", "error: expected two numbers"),
        ("nonsense", "error: no such tool"),
    ],
)
def test_results_are_computed(text, expected):
    turn = f"<tool>{text}</tool>"
    assert tools.results(tools.calls(turn)) == f"<result>{expected}</result>"


def test_nothing_a_model_writes_raises():
    g = random.Random(0)
    pieces = [*tools.WORDS, *"(),.=-0123456789ab ", *string.printable, "\0", "\u0663", "9" * 20]
    for _ in range(3000):
        turn = "<tool>" + "".join(g.choice(pieces) for _ in range(g.randrange(12))) + tools.STOP
        said = tools.calls(turn)
        assert len(said) == turn.count(tools.STOP) and tools.results(said).count("<result>") == len(said)
        assert all(0 <= s <= 1 for s in matching.similarities(said, [Call("add", {"a": 1, "b": 2})])[:, 0])


def test_chains_are_solved_by_their_calls():
    g, names = random.Random(1), set()
    for operations, digits in itertools.product((1, 2, 3), (1, 2)):
        for _ in range(40):
            question, calls, answer = tools.chain(g, operations, digits)
            assert eval(question.removesuffix("=")) == int(answer) >= 0 and len(calls) == operations
            assert tools.result(calls[-1]) == answer
            for before, after in itertools.pairwise(calls):
                assert tools.result(before) == str(after.arguments["a"])
            for call in calls:
                assert tools.calls(tools.written(call)) == [call]
            names |= {call.name for call in calls}
    assert names == {"add", "sub", "mul"}


def test_warming_texts_are_right_but_for_the_noise():
    g, right = random.Random(2), {0.0: 0, 0.5: 0}
    for noise in right:
        for _ in range(200):
            text = tools.conversation(g, noise)
            question, _, said = text.partition("=")
            turns = re.findall(r"<tool>.*?</tool>", said)
            results = re.findall(r"<result>(.*?)</result>", said)
            assert [tools.result(tools.calls(turn)[0]) for turn in turns] == results and len(turns) == 2
            assert tagged(said) == results[-1]
            right[noise] += eval(question) == int(results[-1])
    assert right[0.0] == 200 and 30 < right[0.5] < 120


def test_words_are_single_tokens():
    words = tiny.tokenizer(tools.WORDS)
    text = "(7+5)*3=<tool>add(7,5)</tool><result>12</result><answer>x</answer>"
    ids = words(text).input_ids
    assert words.decode(ids) == text and len(ids) == 8 + 1 + 5 + 2 + 1 + 2 + 1 + 3
    assert tiny.tokenizer()(text).input_ids != ids and len(tiny.tokenizer()(text).input_ids) == len(text)


def test_rules():
    s = np.array([[0.9, 0.8], [0.85, 0.1], [0.0, 0.0]])
    assert tools.rule("greedy")(s).tolist() == [0.9, 0.1, 0.0]
    assert tools.rule("greedy(penalty=0.5)")(s).tolist() == [0.9, 0.1, -0.5]
    assert tools.rule("sinkhorn(regularization=0.2)")(s).tolist() == matching.sinkhorn(s, 0.2).tolist()
    pytest.importorskip("scipy")
    assert tools.rule("optimal()")(s).tolist() == [0.8, 0.85, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hungarian", r"matching: expected optimal, greedy, sinkhorn, with settings by name, got 'hungarian'"),
        ("greedy(0.5)", "matching: expected optimal, greedy, sinkhorn, with settings by name"),
        ("sinkhorn(penalty=1.0)", "matching: expected sinkhorn with regularization, iterations, got .*penalty"),
    ],
)
def test_bad_rules(text, message):
    with pytest.raises(ValueError, match=message):
        tools.rule(text)


def test_calculator_problems():
    problems = tasks.load(["calculator(operations=3, digits=2, size=200)"], 0.2)
    for p in problems.held_out:
        assert eval(p.question.removesuffix("=")) == int(p.answer) and len(p.calls) == 3
        assert p.reward(f"7<answer> {p.answer} </answer>") == 1.0
        # A number that no answer holds, or a tool said, is no answer.
        assert p.reward(p.answer) == p.reward(f"<result>{p.answer}</result>") == 0.0
